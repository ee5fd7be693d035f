"""``deal data import-cl-benchmark``: a public benchmark becomes task folders and an experiment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deal_core.atomic_write import atomic_path, atomic_write
from deal_core.errors import UserError, choose
from simulations.importing.benchmark import LAYOUTS, Layout, SourceRow, find_tasks
from simulations.importing.survey import Survey, is_whole, survey
from simulations.output.console import print_line
from simulations.output.files import toml_value

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"retained_rank": 24, "first_layer": 20},
    "federation": {"clients": 4, "rounds": 2},
    "train": {"learning_rate": 3e-3, "batch_size": 8},
}
"""A start for the embedded language model on two cores; not tuned on any of these tasks."""
INSTRUCTION = "Read the text and answer."
"""Of a task that has none of its own."""
SHOWN_LABELS = 60
"""Characters of a task's labels in the table."""


@dataclass(frozen=True)
class ImportRequest:
    """The arguments of ``deal data import-cl-benchmark``.

    Attributes:
        folder: of the benchmark.
        out: folder to make.
        layout: a name in ``LAYOUTS``.
        max_labels: see :func:`simulations.importing.survey.survey`.
    """

    folder: Path
    out: Path
    layout: str = "cl-benchmark"
    max_labels: int = 20


@dataclass(frozen=True)
class Imported:
    """Attributes: the ``survey`` of a task; by split, how many examples of it were ``written``, and
    how many ``left_out`` since their text or answer is empty."""

    survey: Survey
    written: Mapping[str, int]
    left_out: Mapping[str, int]


def import_benchmark(request: ImportRequest, console: Console) -> Path:
    """Write a folder per task and an experiment file beside them; show what there is.

    Returns:
        The experiment file.

    Raises:
        UserError: unknown format, a folder of another shape, a bad example, or a folder to write
            that is not empty; nothing has been written.
    """
    layout = choose("--format", request.layout, LAYOUTS)
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise UserError(f"{request.out}: is there already; choose another --out")
    tasks = find_tasks(request.folder, request.layout)
    surveys = [survey(task, layout, request.max_labels) for task in tasks]
    try:
        done = [_written(each, layout, request.out / each.task.name) for each in surveys]
        path = request.out / f"{request.layout}.toml"
        atomic_write(path, experiment_text(surveys, layout, request))
    except OSError as error:
        raise UserError(
            f"{request.out}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    console.print(table(done))
    print_line(console, f"deal simulate {path}")
    return path


def _written(found: Survey, layout: Layout, folder: Path) -> Imported:
    written, left_out = {}, {}
    for split in found.task.files:
        written[split] = left_out[split] = 0
        with (
            atomic_path(folder / f"{split}.jsonl") as beside,
            beside.open("w", encoding="utf-8", errors="replace") as file,
        ):
            for row in found.rows(split, layout):
                if not is_whole(row):
                    left_out[split] += 1
                    continue
                written[split] += 1
                file.write(json.dumps(_values(row, found), ensure_ascii=False) + "\n")
    return Imported(found, written, left_out)


def _values(row: SourceRow, found: Survey) -> dict[str, Any]:
    answer, *others = row.answers
    if found.labels:
        return {"text": row.text, "label": answer}
    values: dict[str, Any] = {"text": row.text, "target": answer}
    return {**values, "references": others} if found.references else values


def experiment_text(surveys: Sequence[Survey], layout: Layout, request: ImportRequest) -> str:
    """Return the experiment on all tasks as TOML."""
    return "\n".join(_lines(surveys, layout, request)) + "\n"


def _lines(surveys: Sequence[Survey], layout: Layout, request: ImportRequest) -> Iterator[str]:
    yield f"# deal simulate {request.out / request.layout}.toml"
    yield "#"
    yield f"# Made from {request.folder} by deal data import-cl-benchmark."
    yield f"description = {toml_value(f'{len(surveys)} tasks of {request.folder.name}')}"
    for name, values in _tables(surveys, layout, request.out).items():
        yield f"\n[{name}]"
        quoted = "." in name  # keys are names of tasks
        for key, value in values.items():
            yield f"{toml_value(key) if quoted else key} = {toml_value(value)}"


def _tables(
    surveys: Sequence[Survey], layout: Layout, out: Path
) -> Mapping[str, Mapping[str, Any]]:
    model = {
        "family": "causal-lm",
        "name": "embedded:smollm2",
        "template": layout.template,
    }
    data: dict[str, Any] = {
        "source": "files",
        "path": str(out.resolve()),
        "tasks": [each.task.name for each in surveys],
        "generation": [each.task.name for each in surveys if not each.labels],
    }
    if any(each.references for each in surveys):
        data["references_column"] = "references"
    labels = {each.task.name: each.labels for each in surveys if each.labels}
    asked = {each.task.name: each.instruction or INSTRUCTION for each in surveys}
    tables = {"model": model, "data": data, "data.labels": labels, "data.instructions": asked}
    return {name: values for name, values in {**tables, **SETTINGS}.items() if values}


def table(done: Sequence[Imported]) -> Table:
    """One line a task."""
    drawn = Table(title="Imported tasks")
    for name in ("task", "train", "test", "left out", "answers"):
        drawn.add_column(name, justify="right" if name in ("train", "test", "left out") else "left")
    for each in done:
        labels = each.survey.labels
        listed = ", ".join(labels)
        if len(listed) > SHOWN_LABELS:
            listed = f"{listed[:SHOWN_LABELS]}…"
        test = each.survey.task.files["test"].stem
        row = (
            each.survey.task.name,
            str(each.written["train"]),
            f"{each.written['test']}{'' if test == 'test' else f' ({test})'}",
            str(sum(each.left_out.values())),
            f"{len(labels)} labels: {listed}" if labels else "texts",
        )
        drawn.add_row(*map(Text, row))  # labels are no markup
    return drawn
