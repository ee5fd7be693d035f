"""Scores of labels by the heads of their tasks, with those of label names beside them.

A head has a row of weights and a bias for each label. One with two rows a label answers in two
steps: by the first rows which task, by the second which label of it. Source: docs/method.md, (M43),
(M63).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from deal_core.training.evaluation import NO_ANSWER, AnswerSpace, Scorer


def by_heads(
    embeddings: Tensor,
    space: AnswerSpace,
    heads: Mapping[str, Tensor],
    names: Scorer | None = None,
    weight: float = 0.0,
) -> Scorer:
    """Return scores of labels by the heads of their tasks, a column each of the ``space``; heads of
    other tasks do not matter. A task without a head gives no answer here: its texts are scored by
    the names of labels.

    Args:
        embeddings: of the data, ``(examples, size)``.
        space: the columns.
        heads: task to ``(labels, size + 1)``, or ``(labels, 2, size + 1)``.
        names: scores of label names; of log probabilities it is a product of experts.
        weight: what they count; 0: nothing, and they are not asked for.
    """
    asked = {task for task, _ in space.columns}
    heads = {task: head for task, head in heads.items() if task in asked}
    first = _rows(space, heads, embeddings.shape[1], 0)
    wide = {task: head for task, head in heads.items() if head.dim() == 3}
    second = _rows(space, wide, embeddings.shape[1], 1)
    steps = [_columns(space, task) for task in wide]

    def scores(batch: Sequence[int]) -> Tensor:
        beside = weight * names(batch).double() if names is not None and weight else 0.0
        x = embeddings[list(batch)].double()
        found = _linear(x, first) + beside
        if steps:
            labels = _linear(x, second) + beside
            for columns in steps:
                found[:, columns] = in_two_steps(found[:, columns], labels[:, columns])
        return found

    return scores


def by_names_told(names: Scorer, heads: Scorer, space: AnswerSpace) -> Scorer:
    """Return scores of texts of a task that has no head, beside tasks that have one. Told the task,
    the names of its labels answer. Not told, a head does, as for everybody who does not know the
    task: its own columns stand below all others.

    Args:
        names: scores of label names, a column each of the ``space``.
        heads: scores of :func:`by_heads`.
        space: the columns.
    """
    own = list(space.own)
    others = [place for place in range(len(space.columns)) if place not in own]

    def scores(batch: Sequence[int]) -> Tensor:
        told, found = names(batch)[:, own].double(), heads(batch)
        rest = found[:, others]  # some of which may have no head either
        least = rest.where(rest > NO_ANSWER / 2, 0.0).amin(dim=1, keepdim=True) - 1.0
        found[:, own] = least + told - told.amax(dim=1, keepdim=True)
        return found

    return scores


def in_two_steps(first: Tensor, second: Tensor) -> Tensor:
    """Return ``log(sum_c exp first_c) + log softmax(second)``, ``(texts, labels)``: what the task
    has by the first, divided among its labels by the second."""
    return first.logsumexp(dim=1, keepdim=True) + log_softmax(second, dim=1)


def _linear(x: Tensor, rows: Tensor) -> Tensor:
    return x @ rows[:, :-1].T + rows[:, -1]


def _columns(space: AnswerSpace, task: str) -> list[int]:
    return [place for place, (name, _) in enumerate(space.columns) if name == task]


def _rows(space: AnswerSpace, heads: Mapping[str, Tensor], size: int, step: int) -> Tensor:
    """Weights and bias of each column, ``(columns, size + 1)``, float64."""
    rows = torch.zeros(len(space.columns), size + 1, dtype=torch.float64)
    rows[:, size] = NO_ANSWER
    for task, head in heads.items():
        own = head if head.dim() == 2 else head[:, step]
        for place, row in zip(_columns(space, task), own, strict=False):
            rows[place] = row.double()
    return rows
