"""Which label is taken for which: the test texts of a simulation answered anew by what was learnt.

Sites tell the server how many answers were right and no more, so ``results.json`` cannot have it.
Where the texts are at hand, as in a simulation, they are answered as the last evaluation did. Of
answers that are texts it is how near they are to right ones, by every measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import Field

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError
from deal_core.inference.folder import AdapterFolder
from server.folder import RunFolder
from server.results import Results, Strict, read_results
from simulations.run.run_folder import check_data_record

if TYPE_CHECKING:
    from deal_core.inference.predictor import Predictor

FILE = "labels.json"


@dataclass(frozen=True)
class LabelScore:
    """Texts that have a label, that were answered with it, and that are both (``right``)."""

    right: int
    true: int
    answered: int

    @property
    def precision(self) -> float | None:
        """Share of the answers with the label that are right; None: there is none."""
        return self.right / self.answered if self.answered else None

    @property
    def recall(self) -> float | None:
        """Share of the texts of the label that are answered with it; None: there is none."""
        return self.right / self.true if self.true else None

    @property
    def f1(self) -> float:
        """Harmonic mean of both; 0 where nothing is right."""
        return 2 * self.right / (self.true + self.answered) if self.right else 0.0


class TaskCounts(Strict):
    """Of one task, which is told.

    Attributes:
        counts: row of the true label, column of the answer: test texts.
    """

    labels: list[str]
    counts: list[list[int]]

    @property
    def right(self) -> int:
        """Texts that are answered rightly."""
        return sum(row[i] for i, row in enumerate(self.counts))

    @property
    def total(self) -> int:
        """All texts."""
        return sum(map(sum, self.counts))

    def of_label(self, i: int) -> LabelScore:
        """Return the measures of a label."""
        true, answered = sum(self.counts[i]), sum(row[i] for row in self.counts)
        return LabelScore(self.counts[i][i], true, answered)

    @property
    def macro_f1(self) -> float:
        """Mean over the labels that some text has."""
        scores = [self.of_label(i) for i in range(len(self.labels))]
        known = [score.f1 for score in scores if score.true]
        return sum(known) / len(known) if known else 0.0


class TextScores(Strict):
    """Of one task whose answers are texts: means over its test texts, 0 to 1
    (:mod:`deal_core.training.text_overlap`).

    Attributes:
        total: test texts.
    """

    total: int
    exact_match: float = Field(ge=0, le=1)
    rouge_1: float = Field(ge=0, le=1)
    rouge_l: float = Field(ge=0, le=1)


class LabelCounts(Strict):
    """``labels.json`` of a run folder.

    Attributes:
        tasks: those whose answers are labels.
        texts: those whose answers are texts (none in files from before).
    """

    schema_version: int = 1
    tasks: dict[str, TaskCounts] = Field(default_factory=dict)
    texts: dict[str, TextScores] = Field(default_factory=dict)


def read_label_counts(folder: Path) -> LabelCounts | None:
    """Return what was counted; None: nothing was, or it cannot be read."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
        return LabelCounts.model_validate_json(text)
    except (OSError, ValueError):
        return None


def count_labels(folder: Path, progress: Callable[[str], None]) -> LabelCounts:
    """Answer all test texts of a finished simulation, and write ``labels.json``.

    Args:
        folder: of the run.
        progress: told the name of each task.

    Returns:
        What was counted.

    Raises:
        UserError: the run has not finished, or its texts are not here, or not those any more.
    """
    results = read_results(folder)
    if results.config.data.source == "sites":
        raise UserError(
            f"{folder}: the texts of a deployment are at its sites, and stay there; "
            "leave out --labels"
        )
    check_data_record(results.config, folder, "--labels", "leave it out")
    from deal_core.inference.predictor import load_predictor

    predictor = load_predictor(AdapterFolder(RunFolder(folder).adapter))
    tasks: dict[str, TaskCounts] = {}
    texts: dict[str, TextScores] = {}
    for task in results.tasks:
        progress(task)
        if results.measures.get(task, "accuracy") != "accuracy":
            texts[task] = _scored(results, task, predictor)
        else:
            tasks[task] = _counted(results, task, predictor)
    counts = LabelCounts(tasks=tasks, texts=texts)
    atomic_write(folder / FILE, counts.model_dump_json(indent=1) + "\n")
    return counts


def _counted(results: Results, task: str, predictor: Predictor) -> TaskCounts:
    from deal_core.data.sources import load_for_clients
    from deal_core.inference.answer import Answer

    data = load_for_clients(results.config, task)
    places: Mapping[str, int] = {label: i for i, label in enumerate(data.labels)}
    counts = [[0] * len(places) for _ in places]
    for example in data.test:
        answer = predictor.answer(example.text, task)
        assert isinstance(answer, Answer)  # a task with labels
        counts[places[example.label]][places[answer.label]] += 1
    return TaskCounts(labels=list(data.labels), counts=counts)


def _scored(results: Results, task: str, predictor: Predictor) -> TextScores:
    from deal_core.data.sources import load_for_clients
    from deal_core.inference.answer import Written

    pairs = []
    for example in load_for_clients(results.config, task).test:
        answer = predictor.answer(example.text, task)
        assert isinstance(answer, Written)  # a task without labels
        pairs.append((answer.answer, (example.target, *example.references)))
    return text_scores(pairs)


def text_scores(answers: Sequence[tuple[str, Sequence[str]]]) -> TextScores:
    """Return the measures of texts, each with the right ones.

    Args:
        answers: at least one.
    """
    from deal_core.training.text_overlap import exact_match, rouge_1, rouge_l

    return TextScores(
        total=len(answers),
        exact_match=fmean(exact_match(*each) for each in answers),
        rouge_1=fmean(rouge_1(*each) for each in answers),
        rouge_l=fmean(rouge_l(*each) for each in answers),
    )
