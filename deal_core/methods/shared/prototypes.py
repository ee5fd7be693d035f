"""Label heads from class sums: the nearest class mean, in the metric of public texts or as it is;
or, from exact sums, linear discriminant analysis with a covariance within classes, of all tasks and
of each. Source: docs/method.md, (M40), (M62), (M63), (M65), (M69)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deal_core.config.method import PrototypeConfig
from deal_core.lora.state import State
from deal_core.methods.interface import ExactSums, Statistics, SumContext, Tensors
from deal_core.methods.shared.class_sums import (
    COUNT,
    GRAM,
    SUM,
    check,
    collect,
    filled,
    scatter,
    shapes,
    symmetric,
    without_negative,
)
from deal_core.training.public_subspace import lifted

SMALLEST = 1e-6
"""Mean eigenvalue that a covariance is taken to have at least: of equal texts it is 0."""
SCARCE = 0.2
"""The square of so many times the entries per record is the least ridge: a covariance of few
records is known in few directions, and in all others distances of means are mostly chance."""
ABSENT = -1e9
"""Bias of a label that no client has shown, where heads answer alone: it is never the answer."""


SCALE = 8.0
"""Length of all class means in the metric, beside log-probabilities of names."""
CENTRE, DIRECTIONS = "centre", "directions"
"""Of the public subspace, beside the sums."""


def class_statistics(config: PrototypeConfig, names: float = 0.0) -> Statistics:
    """Return what clients add up, and what the server makes of it.

    Args:
        config: what is added up, and how heads are made of it.
        names: weight of label names' scores beside those of class means.
    """
    if config.covariance == "shared":
        exact = ExactSums(shapes, collect, check)
        return Statistics(
            absorb=lambda state, totals, known: absorb_exact(state, totals, config, names > 0),
            once=True,
            layers=config.layers,
            names=names,
            head_rows=2 if config.own_covariance > 0 else 1,
            round_heads=True,
            exact=exact,
        )
    return Statistics(
        absorb=lambda state, totals, known: absorb(state, totals, known, config),
        once=True,
        layers=config.layers,
        directions=config.directions,
        noise_multiplier=config.noise_multiplier,
        names=names,
        round_heads=True,
    )


def absorb(
    state: State, totals: Mapping[str, Tensors], known: SumContext, config: PrototypeConfig
) -> State:
    """Server: make the heads of tasks from their noisy class sums."""
    assert known.subspace is not None
    spread = known.subspace.spread if config.covariance == "public" else None
    made = {
        task: noised_head(
            total[COUNT], total[SUM], known.names[task], known.deviation, spread, config
        )
        for task, total in totals.items()
    }
    sums = dict(state.sums)
    if config.directions:
        sums |= {CENTRE: known.subspace.centre, DIRECTIONS: known.subspace.scaled}
    return replace(state, heads={**state.heads, **made}, sums=sums)


def noised_head(
    count: Tensor,
    total: Tensor,
    names: Tensor,
    deviation: float,
    spread: Tensor | None,
    config: PrototypeConfig,
) -> Tensor:
    """Return the head of a task, ``(labels, size + 1)``, float32: (M62), (M69).

    Class means have one length in the metric: noise makes them longer, and those of few records
    most.

    Args:
        count: records of each label, with noise, ``(labels,)``.
        total: sum of vectors of each label, with noise, ``(labels, size)``.
        names: vectors of the labels' names, ``(labels, size)``.
        deviation: of the noise in each entry, in lengths of a vector.
        spread: variance of public texts in each direction, ``(size,)``; None: one for all.
        config: ridge, and how many records a name counts as.
    """
    prior = config.names_noise * deviation
    means = (total + prior * names.to(total.dtype)) / (count.clamp(min=1.0) + prior)[:, None]
    means = torch.where(count[:, None] + prior > 0, means, names.to(total.dtype))
    metric = torch.ones(means.shape[1]).double()
    if spread is not None:
        metric = spread + float(config.ridge) * spread.mean()
    weights = means / metric
    lengths = (weights * means).sum(dim=1, keepdim=True).clamp(min=SMALLEST).sqrt()
    rows = SCALE * weights / lengths
    return torch.cat([rows, torch.zeros(len(rows), 1).double()], dim=1).float()


def whole_heads(state: State) -> dict[str, Tensor]:
    """Return the heads of a state as they score whole embeddings, ``(..., size + 1)``: what scores
    coordinates in public directions is the same there."""
    if DIRECTIONS not in state.sums:
        return dict(state.heads)
    return {
        task: lifted(head, state.sums[CENTRE], state.sums[DIRECTIONS])
        for task, head in state.heads.items()
    }


def absorb_exact(
    state: State, totals: Mapping[str, Tensors], config: PrototypeConfig, named: bool = False
) -> State:
    """Server: keep the exact sums of a round, and make all heads anew: see :func:`heads`."""
    sums = dict(state.sums)
    for task, total in totals.items():
        sums |= {f"{name}/{task}": value for name, value in total.items()}
    return replace(state, sums=sums, heads=heads(sums, config, named))


def heads(
    sums: Mapping[str, Tensor], config: PrototypeConfig, named: bool = False
) -> dict[str, Tensor]:
    """Return task to its head, float32: (M40), ``(labels, size + 1)``; with a covariance of each
    task's own (M63), ``(labels, 2, size + 1)``.

    Args:
        sums: ``count/TASK`` ``(labels,)``, ``sum/TASK`` ``(labels, size)`` and ``gram/TASK``, its
            upper triangle, of each task.
        config: which covariances, and their ridge.
        named: names of labels answer beside heads, and can answer with a label without records.
    """
    prefix = f"{COUNT}/"
    tasks = [key.removeprefix(prefix) for key in sums if key.startswith(prefix)]
    classes = {task: (sums[f"{COUNT}/{task}"], sums[f"{SUM}/{task}"]) for task in tasks}
    if not classes:
        return {}
    count, total = (torch.cat(parts) for parts in zip(*classes.values(), strict=True))
    means = {task: _means(*own, named) for task, own in classes.items()}
    grams = [sums[f"{GRAM}/{task}"] for task in tasks]
    shared = _covariance(count, total, torch.stack(grams).sum(dim=0))
    rows = _without_common(_rows(count, torch.cat(list(means.values())), shared, config, named))
    parts = torch.split(rows, [len(own) for own, _ in classes.values()])
    found = dict(zip(classes, parts, strict=True))
    if config.own_covariance > 0:
        for task, (own_count, own_total) in classes.items():
            own = _covariance(own_count, own_total, sums[f"{GRAM}/{task}"])
            mixed = config.own_covariance * own + (1 - config.own_covariance) * shared
            second = _without_common(_rows(own_count, means[task], mixed, config, named))
            found[task] = torch.stack([found[task], second], dim=1)
    return {task: head.float() for task, head in found.items()}


def _means(count: Tensor, total: Tensor, named: bool) -> Tensor:
    """Return class means, ``(labels, size)``. A label without records has that of all records of
    its task, where names can answer with it: nothing speaks for it, and little against it."""
    means = total / filled(count)[:, None]
    if named:
        means[count == 0] = total.sum(dim=0) / filled(count.sum())
    return means


def _without_common(rows: Tensor) -> Tensor:
    """Return rows without what they have in common: it adds the same to the score of every label,
    and would be most of what a format rounds. Labels without records stay out of the mean."""
    shown = rows[:, -1] > ABSENT
    if not bool(shown.any()):
        return rows
    centred = rows - rows[shown].mean(dim=0)
    return torch.where(shown[:, None], centred, rows)


def _covariance(count: Tensor, total: Tensor, gram: Tensor) -> Tensor:
    """Covariance within classes, ``(size, size)``, of the upper triangle of a Gram matrix."""
    within = scatter(count, total, symmetric(gram, total.shape[1])) / count.sum()
    return without_negative(within)


def _rows(
    count: Tensor, means: Tensor, within: Tensor | None, config: PrototypeConfig, named: bool
) -> Tensor:
    """Return weights and biases, ``(labels, size + 1)``, float64; ``within``: the covariance in
    whose metric class means are compared, None: none."""
    weights, lost = means, torch.zeros_like(count)
    if within is not None:
        size = len(within)
        scarce = (SCARCE * size / float(filled(count.sum()))) ** 2
        ridge = max(float(config.ridge), scarce)
        added = ridge * (within.trace() / size).clamp(min=SMALLEST)
        metric = within + added * torch.eye(size, dtype=within.dtype)
        factored = torch.linalg.lu_factor(metric)
        weights = torch.linalg.lu_solve(*factored, means.T).T
        spread = 0.5 * torch.linalg.lu_solve(*factored, within).trace()
        lost = torch.where(count > 0, spread / filled(count).clamp(min=1.0), 0.0)  # (M65)
    bias = config.few_records * lost - 0.5 * (weights * means).sum(dim=1)
    if not named:
        bias[count == 0] = ABSENT
    return torch.cat([weights, bias[:, None]], dim=1)
