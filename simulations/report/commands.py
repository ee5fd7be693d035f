"""``deal report`` and ``deal compare``, and the report that ends every run, study and audit. What
is heavy loads inside: a mistake in the input must show at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deal_core.errors import UserError, at_home
from simulations.output import at_work, print_line, wide_console, write_texts

if TYPE_CHECKING:
    from rich.console import Console

REPORT = "report.html"
PRIVACY = "privacy.html"


def add_report_commands(app: typer.Typer) -> None:
    """Add the commands to ``deal``."""
    app.command("report")(report)
    app.command("compare")(compare)


def report(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Folders of runs, studies or audits."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Of runs: answer the test texts anew; F1, ROUGE-1.")
    ] = False,
    privacy: Annotated[
        str,
        typer.Option(metavar="STATE", help="A site's state directory: its ledger as a page in it."),
    ] = "",
) -> None:
    """Write report.html into each folder; with --privacy, a page for a data protection officer."""
    if not paths and not privacy:
        raise UserError("deal report: name a folder, or --privacy STATE")
    console = wide_console()
    if privacy:
        from simulations.report.blocks import render
        from simulations.report.ledger import ledger_page

        folder = at_home(privacy).resolve()
        write_texts(folder, {PRIVACY: render(ledger_page(privacy))})
        print_line(console, f"privacy record in {folder / PRIVACY}")
    for name in paths or []:
        found = at_home(name).resolve()
        folder = found.parent if found.is_file() else found
        with at_work(console, "loading the model" if labels else "writing the report") as say:
            if labels:
                from simulations.report.labels import count_labels

                count_labels(folder, lambda task, far: say(f"answering the texts of {task}", far))
            path = write_report(folder)
        print_line(console, f"report in {path}")


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Two run folders or more.")],
) -> None:
    """Print finished runs side by side: measures, and the settings that differ."""
    from simulations.report.record import compare

    compare(runs, wide_console())


def write_report(folder: Path) -> Path:
    """Return the path of ``report.html``, written anew, of a run, a study (with what a paper takes
    of it) or an audit. UserError: the folder is none of them."""
    from simulations.report.blocks import render
    from simulations.report.run import run_page
    from simulations.report.study import audit_page, membership_page, study_page, write_paper

    pages = {"study.json": study_page, "audit.json": audit_page, "membership.json": membership_page}
    made = next((pages[name] for name in pages if (folder / name).is_file()), run_page)
    page = made(folder)
    write_texts(folder, {REPORT: render(page)})
    if made is study_page:
        write_paper(folder, page)
    return folder / REPORT


def report_after(folder: Path, console: Console) -> None:
    """Write the report of what has just ended, and print where it is. It must cost nothing of what
    it is about: whatever goes wrong is one line."""
    try:
        path = write_report(folder)
    except UserError as error:
        print_line(console, f"no report: {error}")
    except Exception as error:
        print_line(console, f"no report: {type(error).__name__}: {error}")
    else:
        print_line(console, f"{'report':<20}{path}")
