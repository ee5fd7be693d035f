"""``deal report`` and ``deal compare`` as typer knows them; what they do loads inside."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.output.console import wide_console


def add_report_commands(app: typer.Typer) -> None:
    """Add the commands to ``deal``."""
    app.command("report")(report)
    app.command("compare")(compare)


def report(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Folders of runs, studies, budgets or audits."),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Of runs: answer the test texts anew; F1, ROUGE-1.")
    ] = False,
    privacy: Annotated[
        str, typer.Option(metavar="STATE", help="A site's state directory: its ledger as a page.")
    ] = "",
    out: Annotated[
        str, typer.Option(help="File of the page of --privacy; default: STATE/privacy.html.")
    ] = "",
    disjoint_tasks: Annotated[
        bool, typer.Option("--disjoint-tasks", help="With --privacy: no record is in two tasks.")
    ] = False,
) -> None:
    """Write report.html into each folder; with --privacy, a page for a data protection officer."""
    from simulations.report.command import report as write_reports
    from simulations.report.command import report_privacy

    if privacy:
        report_privacy(privacy, out, disjoint_tasks, wide_console())
    if paths or not privacy:
        write_reports(paths or [], wide_console(), labels)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Two run folders or more.")],
    out: Annotated[str, typer.Option(help="Folder of compare.html and compare.csv.")] = ".",
) -> None:
    """Put finished runs side by side: a table, a page and a CSV."""
    from simulations.report.command import report_comparison

    report_comparison(runs, out, wide_console())
