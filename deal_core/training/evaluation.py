"""Right answers on test examples, in two protocols from one score matrix: among the labels of the
example's task, and among the labels of all tasks learnt so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum

import torch
from torch import Tensor

from deal_core.models import Encoded, GeneratingModel, LanguageModel
from deal_core.training.batching import evaluation_batches
from deal_core.training.containment import contained
from deal_core.training.text_overlap import TEXT_MEASURES, TextMeasure

NO_ANSWER = -1e12
"""Score of a label that cannot be the answer."""
Scorer = Callable[[Sequence[int]], Tensor]
"""Positions in the data to scores, ``(positions, columns)``."""


@dataclass(frozen=True)
class AnswerSpace:
    """The labels that the test examples of a task are judged among, a column each.

    Attributes:
        columns: task and label of each.
        own: columns of the task's own labels, in its order.
        classes: of each column its class; several columns may be one class.
    """

    columns: tuple[tuple[str, str], ...]
    own: tuple[int, ...]
    classes: tuple[int, ...]


def answer_space(task: str, own: Sequence[str], learnt: Mapping[str, Sequence[str]]) -> AnswerSpace:
    """Return the columns of all tasks ``learnt`` and of the ``task``, each task once. Source:
    docs/method.md, (M39). Labels of equal name in two tasks are one class.

    Args:
        task: that of the examples.
        own: its labels.
        learnt: tasks learnt so far, in the stream's order, to their labels.
    """
    spaces = dict(learnt) if task in learnt else {**learnt, task: own}
    columns = tuple((name, label) for name, labels in spaces.items() for label in labels)
    keys = [label for _, label in columns]
    number = {key: position for position, key in enumerate(dict.fromkeys(keys))}
    place = {column: position for position, column in enumerate(columns)}
    return AnswerSpace(
        columns, tuple(place[task, label] for label in own), tuple(number[key] for key in keys)
    )


def count_both(
    score: Scorer,
    data: Sequence[Encoded],
    space: AnswerSpace,
    weights: Sequence[float] | None = None,
    alone: bool = False,
) -> tuple[float, float]:
    """Return how many examples are answered rightly among the task's own labels, and among all of
    the ``space``. Of equal scores the first column's wins.

    Args:
        score: gives the columns of the space.
        data: targets are positions in the task's own labels.
        space: the answers among which is chosen.
        weights: what each example counts, ``(examples,)``; None: 1.
        alone: each example is asked about in a pass of its own: an answer depends on no other, and
            one that cannot be had is wrong, and changes nothing else.
    """
    own, classes = torch.tensor(space.own), torch.tensor(space.classes)
    right = right_all = 0.0 if weights else 0
    for batch in evaluation_batches(data, alone):
        scores = contained(partial(finite_scores, score, batch), alone)
        if scores is None:
            continue  # no answer
        targets = torch.tensor([data[i].target for i in batch])
        right += _counted(_best(scores[:, own]) == targets, batch, weights)
        best = _best(scores)
        among_all = (best >= 0) & (classes[best] == classes[own[targets]])
        right_all += _counted(among_all, batch, weights)
    return right, right_all


def _best(scores: Tensor) -> Tensor:
    """Return the column of the largest score, -1 where no score is a number: that is no answer."""
    numbers = scores.nan_to_num(nan=-torch.inf)
    return torch.where(numbers.max(dim=1).values > -torch.inf, numbers.argmax(dim=1), -1)


def _counted(right: Tensor, batch: Sequence[int], weights: Sequence[float] | None) -> float:
    if weights is None:
        return int(right.sum())
    return fsum(weights[i] for i, hit in zip(batch, right.tolist(), strict=True) if hit)


def count_correct(
    model: LanguageModel,
    data: Sequence[Encoded],
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    alone: bool = False,
    measure: TextMeasure = TEXT_MEASURES["rouge-l"],
) -> float:
    """Return how many examples the model answers rightly, among ``labels``; where there are none,
    the sum of the ``measure`` over what it writes. ``weights`` and ``alone`` as for
    :func:`count_both`."""
    if isinstance(model, GeneratingModel) and not labels:
        return fsum(
            measure.share(text, data[i].right) * (weights[i] if weights else 1)
            for batch in evaluation_batches(data, alone)
            for i, text in zip(batch, _written(model, [data[i] for i in batch], alone), strict=True)
        )
    space = answer_space("", labels, {})
    return count_both(by_name(model, data, labels), data, space, weights, alone)[0]


def _written(model: GeneratingModel, batch: Sequence[Encoded], alone: bool) -> list[str]:
    texts = contained(partial(model.write, batch), alone)
    return [""] if texts is None else texts


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
