"""``deal data import-cl-benchmark``: a public benchmark becomes task folders and an experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError, choose
from simulations.importing.benchmark import LAYOUTS, BenchmarkTask, Layout, Row, read_benchmark
from simulations.output.console import print_line
from simulations.output.files import toml_lines, toml_value

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
    """The arguments of ``deal data import-cl-benchmark``: the benchmark's ``folder``, the folder to
    make, and a name in ``LAYOUTS``."""

    folder: Path
    out: Path
    layout: str = "cl-benchmark"


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
    tasks = read_benchmark(request.folder, layout)
    path = request.out / f"{request.layout}.toml"
    texts = {path: experiment_text(tasks, layout, request)}
    for task in tasks:
        for split, rows in task.rows.items():
            lines = [json.dumps(_values(row, task), ensure_ascii=False) for row in rows]
            texts[request.out / task.name / f"{split}.jsonl"] = "\n".join(lines) + "\n"
    try:
        for file, text in texts.items():
            atomic_write(file, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(
            f"{request.out}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    console.print(table(tasks))
    print_line(console, f"deal simulate {path}")
    return path


def _values(row: Row, task: BenchmarkTask) -> dict[str, Any]:
    answer, *others = row.answers
    if task.labels:
        return {"text": row.text, "label": answer}
    values: dict[str, Any] = {"text": row.text, "target": answer}
    return {**values, "references": others} if task.references else values


def experiment_text(tasks: Sequence[BenchmarkTask], layout: Layout, request: ImportRequest) -> str:
    """Return the experiment on all tasks as TOML."""
    data: dict[str, Any] = {
        "source": "files",
        "path": str(request.out.resolve()),
        "tasks": [task.name for task in tasks],
        "generation": [task.name for task in tasks if not task.labels],
    }
    if any(task.references for task in tasks):
        data["references_column"] = "references"
    model = {
        "family": "causal-lm",
        "name": "embedded:smollm2",
        "template": layout.template,
    }
    named: dict[str, dict[str, Any]] = {  # by names of tasks, which are no bare keys
        "data.labels": {toml_value(task.name): task.labels for task in tasks if task.labels},
        "data.instructions": {
            toml_value(task.name): task.instruction or INSTRUCTION for task in tasks
        },
    }
    description = f"{len(tasks)} tasks of {request.folder.name}"
    made = f"# Made from {request.folder} by deal data import-cl-benchmark.\n"
    tables: dict[str, Mapping[str, Any]] = {"model": model, "data": data, **named, **SETTINGS}
    sections = [f"\n[{name}]\n{toml_lines(values)}" for name, values in tables.items() if values]
    return made + toml_lines({"description": description}) + "".join(sections)


def table(tasks: Sequence[BenchmarkTask]) -> Table:
    """One line a task."""
    drawn = Table(title="Imported tasks")
    for name in ("task", "train", "test", "left out", "answers"):
        drawn.add_column(name, justify="right" if name in ("train", "test", "left out") else "left")
    for task in tasks:
        listed = ", ".join(task.labels)
        if len(listed) > SHOWN_LABELS:
            listed = f"{listed[:SHOWN_LABELS]}…"
        row = (
            task.name,
            str(len(task.rows["train"])),
            f"{len(task.rows['test'])}{'' if task.test == 'test' else f' ({task.test})'}",
            str(task.left_out),
            f"{len(task.labels)} labels: {listed}" if task.labels else "texts",
        )
        drawn.add_row(*map(Text, row))  # labels are no markup
    return drawn
