"""Which label is taken for which: the test texts of a simulation answered anew by what was learnt.

Sites tell the server how many answers were right and no more, so ``results.json`` cannot have it.
Where the texts are at hand, as in a simulation, they are answered as the last evaluation did. Of
answers that are texts it is how near they are to right ones, by every measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from deal_core.atomic_write import atomic_write
from deal_core.data import Example, load_for_clients
from deal_core.errors import UserError
from deal_core.inference.folder import AdapterFolder, Answer, Written
from deal_core.training.text_overlap import TEXT_MEASURES
from server.folder import RunFolder
from server.results import Strict, read_results
from simulations.engines import load_plugins
from simulations.output import Table, percent
from simulations.report.blocks import Block, Heading, Text, whole
from simulations.report.record import RunRecord
from simulations.run.simulate import check_rows_same
from simulations.use.predict import Score, calibrated, let_threads_sleep, portion

if TYPE_CHECKING:
    from deal_core.inference.predictor import Predictor

FILE = "labels.json"
FEW = 20
"""Up to so many labels of a task have a confusion matrix."""
ALL_TASKS = "all tasks together"


class TaskCounts(Strict):
    """Test texts of one task by true label (row) and answer (column)."""

    labels: list[str]
    counts: list[list[int]]
    calibration_error: float | None = None
    """ECE, 0 to 1: how far probabilities are from the share of right answers, without a
    temperature."""
    calibration: str = ""
    """What the temperature that was found, and kept, changes; empty: the rows are too few."""

    def scores(self) -> np.ndarray:
        """Return a row for each label: precision, recall (NaN where nothing was answered so, or no
        text has the label) and F1, their harmonic mean (0 where nothing is right)."""
        counts = np.array(self.counts, dtype=float)
        right, true, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
        with np.errstate(invalid="ignore"):
            f1 = np.nan_to_num(2 * right / (true + answered))
            return np.stack([right / answered, right / true, f1], axis=1)

    @property
    def macro_f1(self) -> float:
        """Mean over the labels that some text has."""
        known = [f1 for row, f1 in zip(self.counts, self.scores()[:, 2], strict=True) if any(row)]
        return fmean(known) if known else 0.0


class LabelCounts(Strict):
    """``labels.json`` of a run folder: tasks whose answers are labels, and those with texts, to
    the mean of every measure (:mod:`deal_core.training.text_overlap`)."""

    schema_version: int = 2
    tasks: dict[str, TaskCounts] = Field(default_factory=dict)
    texts: dict[str, dict[str, float]] = Field(default_factory=dict)


def read_label_counts(folder: Path) -> LabelCounts | None:
    """Return what was counted; None: nothing was, or it cannot be read."""
    try:
        return LabelCounts.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def count_labels(folder: Path, progress: Callable[[str, str], None]) -> LabelCounts:
    """Answer all test texts of a finished simulation, and write ``labels.json``; the temperatures
    that suit the answers best, of each task and of all together, stay beside the adapter.

    Args:
        folder: of the run.
        progress: told the name of each task, and how far it is.

    Returns:
        What was counted.

    Raises:
        UserError: the run has not finished, or its texts are not here, or have changed.
    """
    results = read_results(folder)
    if results.config.data.source == "sites":
        raise UserError(
            f"{folder}: the texts of a deployment are at its sites, and stay there; "
            "leave out --labels"
        )
    if results.config.data.tagged(results.tasks[0]):
        raise UserError(f"{folder}: its labels are of words, and not of texts; leave out --labels")
    load_plugins(results.config.plugins)
    check_rows_same(results.config, folder, "--labels", "leave it out")
    let_threads_sleep()
    from deal_core.inference.predictor import confidences_and_hits, gap, load_predictor

    adapter = AdapterFolder(RunFolder(folder).adapter)
    predictor = replace(load_predictor(adapter), temperatures={})
    found, together = LabelCounts(), Score()
    for task in results.tasks:
        progress(task, "")
        data = load_for_clients(results.config, task)
        labels = list(data.labels)
        counts, score = [[0] * len(labels) for _ in labels], Score()
        written: list[tuple[str, Sequence[str]]] = []
        for example, answer in _answered(predictor, data.test, task, progress):
            if isinstance(answer, Answer):
                counts[labels.index(example.label)][labels.index(answer.label)] += 1
                score.add(answer, example.label)
            elif isinstance(answer, Written):
                written.append((answer.answer, (example.target, *example.references)))
        if written:
            found.texts[task] = {
                name: fmean(measure.share(*each) for each in written)
                for name, measure in TEXT_MEASURES.items()
            }
            continue
        found.tasks[task] = TaskCounts(
            labels=labels,
            counts=counts,
            calibration_error=(
                gap(*confidences_and_hits(score.logits, score.targets)) if score.targets else None
            ),
            calibration=calibrated(adapter, task, score),
        )
        with suppress(UserError):  # labels of one task at a time
            predictor.check("")
            for example, answer in _answered(predictor, data.test, "", progress):
                together.add(answer, example.label)
    calibrated(adapter, "", together)
    atomic_write(folder / FILE, found.model_dump_json(indent=1) + "\n")
    return found


def _answered(
    predictor: Predictor, rows: Sequence[Example], task: str, progress: Callable[[str, str], None]
) -> Iterator[tuple[Example, Answer | Written]]:
    whose, count = task or ALL_TASKS, portion(predictor)
    for begin in range(0, len(rows), count):
        some = rows[begin : begin + count]
        yield from zip(some, predictor.answers([row.text for row in some], task), strict=True)
        progress(whose, f"{begin + len(some)} of {len(rows)}")


def label_blocks(run: RunRecord) -> Iterator[Block]:
    """Yield what was counted of a run: scores and confusion of each task."""
    results = run.results
    counted = read_label_counts(run.folder) if results else None
    if counted is None or results is None:
        yield Text(
            "Not counted. Sites tell how many answers were right and no more; in a simulation, "
            "deal report RUN --labels answers the test texts anew, and counts for each label."
        )
        return
    yield Text(
        "At the end of the run, Task-IL; the test texts of a simulation, answered anew. "
        "Precision: of the answers with a label, the share that is right. Recall: of the texts "
        "with a label, the share that is answered with it. F1: their harmonic mean. All in %."
    )
    for number, task in enumerate(results.tasks, start=1):
        yield Heading(f"{number} {task}")
        if task in counted.tasks:
            yield from _task(task, counted.tasks[task])
        if task in counted.texts:
            scores = counted.texts[task]
            columns = ("task", *(measure.title for measure in TEXT_MEASURES.values()))
            row = (task, *(percent(scores.get(name)) for name in TEXT_MEASURES))
            yield Table(f"Texts written for {task}, in %", columns, (row,))


def _task(task: str, counts: TaskCounts) -> Iterator[Block]:
    rows = [
        (label, whole(sum(true)), *(percent(None if np.isnan(v) else v) for v in scores))
        for label, true, scores in zip(counts.labels, counts.counts, counts.scores(), strict=True)
    ]
    columns = ("label", "test texts", "precision", "recall", "F1")
    yield Table(f"Each label of {task}", columns, tuple(rows))
    said = f"{len(counts.labels)} labels, macro F1 {percent(counts.macro_f1)}."
    if counts.calibration_error is not None:
        said += f" Calibration error of probabilities (ECE): {percent(counts.calibration_error)} %."
    if counts.calibration:
        said += f" Of the texts on which no temperature was sought: {counts.calibration}."
    yield Text(said)
    if len(counts.labels) <= FEW:
        cells = zip(counts.labels, counts.counts, strict=True)
        yield Table(
            f"{task}: texts by true label (row) and answer (column)",
            ("true label", *counts.labels),
            tuple((label, *map(whole, row)) for label, row in cells),
        )
