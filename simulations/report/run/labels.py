"""The labels of each task, which are public."""

from __future__ import annotations

from simulations.report.page.blocks import Cell, Table
from simulations.report.page.numbers import whole
from simulations.report.run.record import RunRecord


def labels(run: RunRecord) -> Table | None:
    """Return a row for each task; None: the results are from before labels were in them."""
    found = run.results.labels if run.results else {}
    if not found:
        return None
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (f"{j} {task}", whole(len(found.get(task, []))), ", ".join(found.get(task, [])) or "texts")
        for j, task in enumerate(run.tasks, start=1)
    )
    return Table("Labels of each task", ("task", "labels", "names"), rows, words=(2,))
