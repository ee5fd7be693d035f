"""Scores of labels by the heads of their tasks, with those of label names beside them.

A head has a row of weights and a bias for each label. Source: docs/method.md, (M43).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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
        heads: task to ``(labels, size + 1)``.
        names: scores of label names; of log probabilities it is a product of experts.
        weight: what they count; 0: nothing, and they are not asked for.
    """
    rows = _rows(space, heads, embeddings.shape[1])

    def scores(batch: Sequence[int]) -> Tensor:
        beside = weight * names(batch).double() if names is not None and weight else 0.0
        x = embeddings[list(batch)].double()
        return x @ rows[:, :-1].T + rows[:, -1] + beside

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


def _rows(space: AnswerSpace, heads: Mapping[str, Tensor], size: int) -> Tensor:
    """Weights and bias of each column, ``(columns, size + 1)``, float64."""
    rows = torch.zeros(len(space.columns), size + 1, dtype=torch.float64)
    rows[:, size] = NO_ANSWER
    for task, head in heads.items():
        places = [place for place, (name, _) in enumerate(space.columns) if name == task]
        for place, row in zip(places, head, strict=False):
            rows[place] = row.double()
    return rows
