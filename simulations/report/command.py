"""``deal report`` and ``deal compare``: pages from what is on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from deal_core.errors import UserError, at_home
from simulations.output.console import print_line
from simulations.output.files import write_file, write_texts
from simulations.report.comparison.compared import compare, csv_text
from simulations.report.comparison.page import comparison_page
from simulations.report.comparison.terminal import print_comparison
from simulations.report.page.blocks import Page, render
from simulations.report.privacy import audit, membership
from simulations.report.privacy.ledger_page import ledger_page
from simulations.report.privacy.ledger_record import read_ledger
from simulations.report.run.label_counts import count_labels
from simulations.report.run.page import run_page
from simulations.report.run.record import is_run, read_run
from simulations.report.study import budgets
from simulations.report.study.page import REPORT, study_page
from simulations.report.study.record import read_study
from simulations.study.results import STUDY_JSON

PAGES: Mapping[str, Callable[[Path], Page]] = {
    STUDY_JSON: lambda folder: study_page(read_study(folder)),
    budgets.FILE: lambda folder: budgets.budgets_page(budgets.read_budgets(folder)),
    audit.FILE: lambda folder: audit.audit_page(audit.read_audit(folder)),
    membership.FILE: membership.membership_report,
}
"""File of figures to the page of its folder; any other folder is that of a run."""
PRIVACY = "privacy.html"


def page_of(folder: Path) -> Page:
    """Return the page of what lies in a folder: a study, budgets, an audit, or a run.

    Raises:
        UserError: none of them, or it cannot be read.
    """
    for name, make in PAGES.items():
        if (folder / name).is_file():
            return make(folder)
    if is_run(folder):
        return run_page(read_run(folder))
    raise UserError(
        f"{folder}: no run, study, budgets or audit here; name the folder that --out named"
    )


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of what lies in a folder.

    Returns:
        Its path.

    Raises:
        UserError: nothing there to report, or it cannot be read or written.
    """
    write_texts(folder, {REPORT: render(page_of(folder))})
    return folder / REPORT


def report(paths: Sequence[str], console: Console, labels: bool = False) -> None:
    """Write a report for each path, and print where it is.

    Args:
        paths: folders, or files in them.
        console: told where the pages are.
        labels: answer the test texts of runs anew first, to count for each label.

    Raises:
        UserError: as :func:`write_report`; those before are written.
    """
    if not paths:
        raise UserError("deal report: name a folder, or --privacy STATE")
    for path in paths:
        folder = _folder(path)
        if labels:
            with console.status("loading the model") as status:
                count_labels(folder, lambda task: status.update(f"answering the texts of {task}"))
        print_line(console, f"report in {write_report(folder)}")


def _folder(path: str) -> Path:
    """Return the folder that is meant: a file in it means the folder, too."""
    found = at_home(path).resolve()
    return found.parent if found.is_file() else found


def report_privacy(state: str, out: str, disjoint_tasks: bool, console: Console) -> None:
    """Write the ledger of a state directory as one document.

    Args:
        state: the directory.
        out: the file; empty: ``privacy.html`` in it.
        disjoint_tasks: compose tasks in parallel.
        console: told where the page is.

    Raises:
        UserError: no ledger, or one that cannot be trusted; the file cannot be written.
    """
    page = render(ledger_page(read_ledger(state, disjoint_tasks)))
    path = write_file(out or at_home(state) / PRIVACY, page)
    print_line(console, f"privacy record in {path.resolve()}")


def report_comparison(folders: Sequence[str], out: str, console: Console) -> None:
    """Print a comparison of runs, and write it as a page and as CSV.

    Args:
        folders: of the runs.
        out: folder of both files.
        console: for the table.

    Raises:
        UserError: as :func:`~simulations.report.comparison.compared.compare`; the files cannot be
            written.
    """
    compared = compare(folders)
    print_comparison(console, compared)
    to = at_home(out).resolve()
    page = render(comparison_page(compared))
    write_texts(to, {"compare.html": page, "compare.csv": csv_text(compared)})
    print_line(console, f"page in {to / 'compare.html'}, figures in {to / 'compare.csv'}")
