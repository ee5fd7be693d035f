"""Accuracy of every task over time: heat maps, curves, and a table of what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deal_core.training.text_overlap import TEXT_MEASURES
from simulations.output.console import stage_title
from simulations.report.charts.drawings import Axes, Line, Panel, panels
from simulations.report.page.blocks import (
    Block,
    Cell,
    Figure,
    Heading,
    HeatCell,
    HeatMap,
    Notice,
    Number,
    Section,
    Table,
    Text,
    percent,
    pointer,
    points,
)
from simulations.report.run.record import RunRecord

LEVELS = 10
NAMED_COLUMNS = 8
"""Up to so many tasks a heat map names them in its columns; beyond, it has their numbers."""

Rows = Sequence[Sequence[float | None]]


def accuracy(run: RunRecord) -> Section:
    """Return the section."""
    return Section("accuracy", "Accuracy on every task", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    if not run.matrix and not any(value is not None for value in run.zero_shot):
        yield Notice("Nothing has been evaluated.")
        return
    texts = [task for task in run.tasks if run.is_text(task)]
    for name, measure in TEXT_MEASURES.items():
        so = [task for task in texts if run.experiment.data.measure(task) == name]
        if so:
            yield Text(f"Answers are texts, measured by {measure.title}, in: {', '.join(so)}.")
    yield heat_map(run, run.matrix, "Accuracy in %, the task told", ("accuracy_matrix",))
    if run.among_all:
        caption = "Accuracy in %, among all labels seen so far"
        yield heat_map(run, run.among_all, caption, ("class_incremental", "accuracy_matrix"))
    if run.matrix:
        yield Heading("Over time")
        yield curves(run)
        yield Heading("What was kept")
        yield kept(run)


def heat_map(run: RunRecord, rows: Rows, caption: str, place: tuple[str, ...]) -> HeatMap:
    """Return the matrix: a row for what was known before, and one after each stage.

    Args:
        run: of which.
        rows: of the matrix.
        caption: of the table.
        place: of the matrix in ``results.json``.
    """
    known = [v for row in [run.zero_shot, *rows] for v in row if v is not None]
    low, high = _ends(known)
    begun, learnt = run.spans
    pointed = run.results is not None

    def cell(value: float | None, stage: int, j: int, source: str) -> HeatCell | None:
        number = percent(value, source if pointed else "")
        if not isinstance(number, Number):
            return None
        level = min(LEVELS - 1, int(LEVELS * (number.value - low) / (high - low)))
        mark = "learnt" if stage == learnt[j] else "future" if stage < begun[j] else ""
        return HeatCell(number, level, mark)  # type: ignore[arg-type]

    start = tuple(
        cell(value, -1, j, pointer("zero_shot", task))
        for j, (task, value) in enumerate(zip(run.tasks, run.zero_shot, strict=True))
    )
    named = len(run.tasks) <= NAMED_COLUMNS
    return HeatMap(
        caption,
        "after",
        tuple(f"{j} {task}" if named else str(j) for j, task in enumerate(run.tasks, start=1)),
        (
            ("nothing (zero-shot)", start),
            *(
                (
                    stage_title(i, run.tasks, run.stages),
                    tuple(cell(v, i, j, pointer(*place, i, j)) for j, v in enumerate(row)),
                )
                for i, row in enumerate(rows)
            ),
        ),
        f"{100 * low:.0f}",
        f"{100 * high:.0f}",
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the tens, 0 to 1, around all values."""
    low = min(0.9, int(10 * min(values, default=0.0)) / 10)
    high = max(low + 0.1, -(-10 * max(values, default=1.0) // 1) / 10)
    return low, high


def curves(run: RunRecord) -> Figure:
    """Return the accuracy on each task from before the run to its end."""
    _, learnt = run.spans
    own, every = _columns(run, run.matrix), _columns(run, run.among_all)
    each = [
        Panel(
            f"{j + 1} {task}",
            tuple(Line(tuple(found[j])) for found in (own, every) if found),
            mark=learnt[j] + 1 if learnt[j] < len(run.matrix) else None,
            level=None if run.zero_shot[j] is None else 100 * (run.zero_shot[j] or 0.0),
        )
        for j, task in enumerate(run.tasks)
    ]
    last = len(run.matrix)
    step = max(1, -(-last // 6))
    ticks = tuple((i, str(i)) for i in range(0, last + 1, step))
    solid = "Solid: the task told; the dot is where it was just learnt. "
    dashed = "Dashed: among all labels seen so far. " if every else ""
    alt = f"Accuracy on each of {len(run.tasks)} tasks after each of {last} stages"
    axes = Axes("stages learnt", "accuracy (%)", ticks)
    return Figure(
        f"Accuracy on each task after each stage. {solid}{dashed}Dotted: zero-shot.",
        panels("curves", alt, each, axes),
        _curve_table(run, own, every),
        narrow=panels("curves-narrow", alt, each, axes, wide=False),
    )


def _columns(run: RunRecord, rows: Rows) -> list[list[float | None]]:
    """Return, for each task, zero-shot accuracy and that after each stage, in per cent."""
    if not rows:
        return []
    return [
        [None if v is None else 100 * v for v in (run.zero_shot[j], *(row[j] for row in rows))]
        for j in range(len(run.tasks))
    ]


def _curve_table(
    run: RunRecord, own: list[list[float | None]], every: list[list[float | None]]
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, columns in (("", own), (", all labels", every)):
        for j, values in enumerate(columns):
            shares = (None if v is None else v / 100 for v in values)
            rows.append((f"{j + 1} {run.tasks[j]}{name}", *(percent(v) for v in shares)))
    stages = (f"after stage {i}" for i in range(1, len(run.matrix) + 1))
    return Table("Accuracy in % over time", ("task", "zero-shot", *stages), tuple(rows))


def kept(run: RunRecord) -> Table:
    """Return a row for each task: before, just learnt, at the end, the difference."""
    _, learnt = run.spans
    last = len(run.matrix) - 1
    rows: list[tuple[Cell, ...]] = []
    for j, task in enumerate(run.tasks):
        then = run.matrix[learnt[j]][j] if learnt[j] <= last else None
        now = run.matrix[last][j]
        since = None if then is None or now is None else now - then
        row: list[Cell] = [f"{j + 1} {task}", percent(run.zero_shot[j]), percent(then)]
        row += [percent(now), points(since)]
        if run.among_all:
            row.append(percent(run.among_all[-1][j]))
        rows.append(tuple(row))
    columns = ["task", "zero-shot", "just learnt", "at the end", "points since"]
    columns += ["at the end, all labels"] if run.among_all else []
    return Table("Accuracy in %, and points since the task was learnt", tuple(columns), tuple(rows))
