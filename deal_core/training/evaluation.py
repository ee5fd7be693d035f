"""Right answers on test examples, in two protocols from one score matrix: among the labels of the
example's task (Task-IL), and among the labels of all tasks learnt so far (Class-IL). Scores come
from names of labels, or from the heads of their tasks on embeddings of the frozen base model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum

import torch
from torch import Tensor

from deal_core.data.tags import entities, entity_f1
from deal_core.lora.attach import base_only
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.models.tokens import TokenLabels
from deal_core.training.loop import contained, evaluation_batches
from deal_core.training.text_overlap import TEXT_MEASURES, TextMeasure

NO_ANSWER = -1e12
"""Score of a label that cannot be the answer."""
Scorer = Callable[[Sequence[int]], Tensor]
"""Positions in the data to scores, ``(positions, columns)``."""


@dataclass(frozen=True)
class AnswerSpace:
    """The labels that the test examples of a task are judged among, a column each."""

    columns: tuple[tuple[str, str], ...]
    """Task and label of each."""
    own: tuple[int, ...]
    """Columns of the task's own labels, in its order."""
    classes: tuple[int, ...]
    """Of each column its class; several columns may be one class."""


def answer_space(task: str, own: Sequence[str], learnt: Mapping[str, Sequence[str]]) -> AnswerSpace:
    """Return the columns of all tasks ``learnt`` and of the ``task``, each task once. Source:
    docs/method.md, (M39). Labels of equal name in two tasks are one class."""
    spaces = dict(learnt) if task in learnt else {**learnt, task: own}
    columns = tuple((name, label) for name, labels in spaces.items() for label in labels)
    keys = [label for _, label in columns]
    number = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    place = {column: position for position, column in enumerate(columns)}
    return AnswerSpace(
        columns, tuple(place[task, label] for label in own), tuple(number[key] for key in keys)
    )


def count_both(score: Scorer, data: Sequence[Encoded], space: AnswerSpace) -> tuple[int, int]:
    """Return how many examples are answered rightly among the task's own labels, and among all of
    the ``space``, whose columns are scored. Of equal scores the first column's wins.

    Args:
        score: gives the columns.
        data: targets are positions in the task's own labels.
        space: the answers among which is chosen.
    """
    own, classes = torch.tensor(space.own), torch.tensor(space.classes)
    right = right_all = 0
    for batch in evaluation_batches(data):
        scores = finite_scores(score, batch)
        targets = torch.tensor([data[i].target for i in batch])
        right += int((_best(scores[:, own]) == targets).sum())
        best = _best(scores)
        right_all += int(((best >= 0) & (classes[best] == classes[own[targets]])).sum())
    return right, right_all


def _best(scores: Tensor) -> Tensor:
    """Return the column of the largest score, -1 where no score is a number: that is no answer."""
    numbers = scores.nan_to_num(nan=-torch.inf)
    return torch.where(numbers.max(dim=1).values > -torch.inf, numbers.argmax(dim=1), -1)


def count_correct(
    model: LanguageModel,
    data: Sequence[Encoded],
    labels: Sequence[str],
    measure: TextMeasure = TEXT_MEASURES["rouge-l"],
) -> float:
    """Return how many examples the model answers rightly, among ``labels``; where there are none,
    the sum of the ``measure`` over what it writes; of tags F1 times :func:`examples_in`."""
    if isinstance(model, TokenLabels):
        pairs = zip(tagged(model, data, labels), (item.right for item in data), strict=True)
        return entity_f1(pairs) * examples_in(model, data)
    if isinstance(model, GeneratingModel) and not labels:
        return fsum(text_shares(lambda batch: model.write([data[i] for i in batch]), data, measure))
    return count_both(by_name(model, data, labels), data, answer_space("", labels, {}))[0]


def tagged(
    model: TokenLabels, data: Sequence[Encoded], labels: Sequence[str]
) -> list[Sequence[str]]:
    """Return the likeliest tags of each text's words, in the order of the data."""
    found = dict[int, Sequence[str]]()
    for batch in evaluation_batches(data):
        found.update(zip(batch, model.tagged([data[i] for i in batch], labels), strict=True))
    return [found[i] for i in range(len(data))]


def examples_in(model: LanguageModel, data: Sequence[Encoded]) -> int:
    """Return how much the data count beside others': so many examples, or true entities."""
    if isinstance(model, TokenLabels):
        return sum(len(entities(item.right)) for item in data)
    return len(data)


def text_shares(
    answer: Callable[[Sequence[int]], Sequence[str]], data: Sequence[Encoded], measure: TextMeasure
) -> list[float]:
    """Return the ``measure`` of what is answered to positions in the data, for each of these."""
    shares = [0.0] * len(data)
    for batch in evaluation_batches(data):
        for place, text in zip(batch, answer(batch), strict=True):
            shares[place] = measure.share(text, data[place].right)
    return shares


def by_name(model: LanguageModel, data: Sequence[Encoded], labels: Sequence[str]) -> Scorer:
    """Score labels by their names, a column each; equal names have equal scores to the bit."""
    names = list(dict.fromkeys(labels))
    places = torch.tensor([names.index(label) for label in labels])
    return lambda batch: model.scores([data[i] for i in batch], names).cpu()[:, places]


def finite_scores(score: Scorer, batch: Sequence[int]) -> Tensor:
    """Return ``(batch, columns)``. Where an example gives no number each is asked about alone, so
    that the answers to the others do not depend on it."""
    with torch.no_grad():
        scores = score(batch)
        if bool(scores.isfinite().all()):
            return scores
        return torch.cat([score([position]) for position in batch])


def by_heads(
    embeddings: Tensor,
    space: AnswerSpace,
    heads: Mapping[str, Tensor],
    names: Scorer | None = None,
    weight: float = 0.0,
) -> Scorer:
    """Return scores of labels by the heads of their tasks, ``(labels, size + 1)``, on embeddings of
    the data, ``(examples, size)``: a column each of the ``space``; heads of other tasks do not
    matter. A task without a head gives no answer here: its texts are scored by the names of labels.
    Scores of ``names`` count beside with a ``weight``; of log probabilities it is a product of
    experts. 0: they are not asked for.
    """
    size = embeddings.shape[1]
    rows = torch.zeros(len(space.columns), size + 1, dtype=torch.float64)
    rows[:, size] = NO_ANSWER
    for task, head in heads.items():
        places = [place for place, (name, _) in enumerate(space.columns) if name == task]
        for place, row in zip(places, head, strict=False):
            rows[place] = row.double()

    def scores(batch: Sequence[int]) -> Tensor:
        beside = weight * names(batch).double() if names is not None and weight else 0.0
        x = embeddings[list(batch)].double()
        return x @ rows[:, :-1].T + rows[:, -1] + beside

    return scores


def route(embeddings: Tensor, heads: Mapping[str, Tensor]) -> list[str]:
    """Return the task of each text, of ``embeddings`` ``(texts, size)``: that of the label, of all
    tasks' labels, whose class mean is the nearest; a task that writes has one row. Source:
    docs/method.md (M72)."""
    x = embeddings.double()
    best = [(x @ head[:, :-1].double().T + head[:, -1].double()).amax(1) for head in heads.values()]
    places = torch.stack(best, dim=1).nan_to_num(nan=-torch.inf).argmax(dim=1)
    names = list(heads)
    return [names[place] for place in places.tolist()]


def by_names_told(names: Scorer, heads: Scorer, space: AnswerSpace) -> Scorer:
    """Return scores of texts of a task that has no head, beside tasks that have one. In Task-IL the
    names of its labels answer; in Class-IL a head does, as for everybody who does not know the
    task: its own columns stand below all others."""
    own = list(space.own)
    others = [place for place in range(len(space.columns)) if place not in own]

    def scores(batch: Sequence[int]) -> Tensor:
        told, found = names(batch)[:, own].double(), heads(batch)
        rest = found[:, others]  # some of which may have no head either
        least = rest.where(rest > NO_ANSWER / 2, 0.0).amin(dim=1, keepdim=True) - 1.0
        found[:, own] = least + told - told.amax(dim=1, keepdim=True)
        return found

    return scores


def base_embeddings(model: LanguageModel, data: Sequence[Encoded], layers: int = 1) -> Tensor:
    """Return unit vectors ``(examples, size)`` in the order of the data, float32, on the CPU;
    whatever adapters the model holds."""
    parts: dict[int, Tensor] = {}
    with base_only(model.module):
        for batch in evaluation_batches(data):
            vectors = model.embed([data[i] for i in batch], layers).float().cpu()
            parts.update(zip(batch, vectors, strict=True))
    return torch.stack([parts[i] for i in range(len(data))])


def embeddings_alone(
    model: LanguageModel, data: Sequence[Encoded], layers: int, size: int
) -> Tensor:
    """Return the same where single records are protected, rows of ``size``: each text in a pass of
    its own, and the row of one that cannot be embedded is no number, so that no text changes the
    row of another."""

    def embed(text: Encoded) -> Tensor:
        return model.embed([text], layers)[0].float().cpu()

    rows = torch.full((len(data), size), torch.nan)
    with base_only(model.module):
        for place, text in enumerate(data):
            row = contained(partial(embed, text), alone=True)
            if row is not None:
                rows[place] = row
    return rows
