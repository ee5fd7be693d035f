"""What ends with a report: a run, a study, a budget study, an audit; stopped early or not.

What is heavy loads inside: a mistake in the input must show at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deal_core.errors import UserError
from simulations.output.console import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.audit.command import AuditRequest
    from simulations.audit.membership import MembershipRequest
    from simulations.budgets.command import BudgetsRequest
    from simulations.deployment.demo.run import DemoRequest
    from simulations.run.experiment import Request
    from simulations.study.command import StudyRequest


def simulate_with_report(request: Request, console: Console) -> int:
    """Run an experiment; whatever it has come to is in its report.

    Returns:
        The exit code of the run.

    Raises:
        UserError: bad input (nothing has started), or a run that cannot go on.
    """
    from simulations.run.simulate import simulate

    return simulate(request, console, lambda folder: report_after(folder, console))


def study_with_report(request: StudyRequest, console: Console) -> int:
    """Work off a study, and write its report.

    Returns:
        The exit code of the study.

    Raises:
        UserError: bad input; nothing has started.
    """
    from simulations.study.command import run_study, study_folder

    return _reported(lambda: run_study(request, console), study_folder(request), console)


def budgets_with_report(request: BudgetsRequest, console: Console) -> int:
    """Work off a budget study, and write its report.

    Returns:
        The exit code of the study.

    Raises:
        UserError: bad input; nothing has started.
    """
    from simulations.budgets.command import budgets_folder, run_budgets

    return _reported(lambda: run_budgets(request, console), budgets_folder(request), console)


def audit_with_report(request: AuditRequest, console: Console) -> int:
    """Audit, and write the report; an audit that was stopped has nothing to report yet.

    Returns:
        The exit code of the audit.

    Raises:
        UserError: bad input; nothing has started.
    """
    from simulations.audit.command import audit_folder, run_audit

    folder = audit_folder(request)
    code = run_audit(request, console)
    if (folder / "audit.json").is_file():
        report_after(folder, console)
    return code


def membership_with_report(request: MembershipRequest, console: Console) -> int:
    """Attack what leaves the sites, and write the report.

    Returns:
        The exit code of the audit.

    Raises:
        UserError: bad input, or an experiment without class sums.
    """
    from simulations.audit.membership import membership_folder, run_membership

    return _reported(lambda: run_membership(request, console), membership_folder(request), console)


def demo_with_report(request: DemoRequest, console: Console) -> int:
    """Demonstrate a deployment; the report is that of its run.

    Returns:
        The exit code: 0; 130 where it was stopped.

    Raises:
        UserError: something did not start or finish; nothing runs any more.
    """
    from simulations.deployment.demo.run import demo_deployment

    return demo_deployment(request, console, lambda folder: report_after(folder, console))


def _reported(work: Callable[[], int], folder: Path, console: Console) -> int:
    code = work()
    report_after(folder, console)
    return code


def report_after(folder: Path, console: Console) -> None:
    """Write the report of what has just ended, and print where it is. It must cost nothing of what
    it is about: whatever goes wrong is one line."""
    try:
        # Imports torch and matplotlib: after the quick checks of a run.
        from simulations.report.command import write_report

        path = write_report(folder)
    except UserError as error:
        print_line(console, f"no report: {error}")
    except Exception as error:
        print_line(console, f"no report: {type(error).__name__}: {error}")
    else:
        print_line(console, f"{'report':<20}{path}")
