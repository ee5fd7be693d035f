"""Label heads from class sums: nearest class mean, or linear discriminant analysis with a
covariance within classes, of all tasks and of each. Source: docs/method.md, (M40), (M62) to (M65),
(M67)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deal_core.config.method import PrototypeConfig
from deal_core.lora.state import State
from deal_core.methods.interface import Statistics, SumContext, Tensors
from deal_core.methods.shared.class_sums import COUNT, GRAM, SUM, scatter, without_negative
from deal_core.training.public_subspace import lifted

SMALLEST = 1e-6
"""Mean eigenvalue that a covariance is taken to have at least: of equal texts it is 0."""
SCARCE = 0.2
"""The square of so many times the entries per record is the least ridge: a covariance of few
records is known in few directions, and in all others distances of means are mostly chance."""
ABSENT = -1e9
"""Bias of a label that no client has shown, where heads answer alone: it is never the answer."""


CENTRE, DIRECTIONS = "centre", "directions"
"""Of the public subspace, beside the sums."""


def class_statistics(config: PrototypeConfig, names: float = 0.0) -> Statistics:
    """Return what clients add up, and what the server makes of it.

    Args:
        config: what is added up, and how heads are made of it.
        names: weight of label names' scores beside those of class means.
    """
    covariance = config.covariance == "shared"
    return Statistics(
        absorb=lambda state, totals, known: absorb(state, totals, known, config, names > 0),
        once=True,
        layers=config.layers,
        directions=config.directions,
        noise_multiplier=config.noise_multiplier,
        gram=covariance,
        names=names,
        head_rows=2 if covariance and config.own_covariance > 0 else 1,
        round_heads=True,
    )


def absorb(
    state: State,
    totals: Mapping[str, Tensors],
    known: SumContext,
    config: PrototypeConfig,
    named: bool = False,
) -> State:
    """Server: keep the sums of a round, and make all heads anew: see :func:`heads`."""
    sums = dict(state.sums)
    for task, total in totals.items():
        sums |= {f"{name}/{task}": value for name, value in total.items()}
    if known.subspace is not None:
        sums |= {CENTRE: known.subspace.centre, DIRECTIONS: known.subspace.scaled}
    return replace(state, sums=sums, heads=heads(sums, known, config, named))


def whole_heads(state: State) -> dict[str, Tensor]:
    """Return the heads of a state as they score whole embeddings, ``(..., size + 1)``: what scores
    coordinates in public directions is the same there."""
    if DIRECTIONS not in state.sums:
        return dict(state.heads)
    return {
        task: lifted(head, state.sums[CENTRE], state.sums[DIRECTIONS])
        for task, head in state.heads.items()
    }


def heads(
    sums: Mapping[str, Tensor], known: SumContext, config: PrototypeConfig, named: bool = False
) -> dict[str, Tensor]:
    """Return task to its head, float32: (M40), ``(labels, size + 1)``; with a covariance of each
    task's own (M63), ``(labels, 2, size + 1)``.

    Args:
        sums: ``count/TASK`` ``(labels,)``, ``sum/TASK`` ``(labels, size)`` and, for a covariance,
            ``gram/TASK`` ``(directions, directions)``, of the first entries.
        known: noise in them, names of labels, and what public texts are like.
        config: which covariances, and their ridge.
        named: names of labels answer beside heads, and can answer with a label without records.
    """
    prefix = f"{COUNT}/"
    tasks = [key.removeprefix(prefix) for key in sums if key.startswith(prefix)]
    if not tasks:
        return {}
    counts = {task: _records(sums[prefix + task], known) for task in tasks}
    totals = {task: sums[f"{SUM}/{task}"] for task in tasks}
    means = {task: _means(counts[task], totals[task], known, task, config) for task in tasks}
    count, total = torch.cat(list(counts.values())), torch.cat(list(totals.values()))
    shared = None
    if config.covariance == "shared":
        gram = torch.stack([sums[f"{GRAM}/{task}"] for task in tasks]).sum(dim=0)
        shared = _covariance(count, total, gram, known)
    all_means = torch.cat(list(means.values()))
    rows = _without_common(_rows(count, all_means, shared, known, config, named))
    parts = torch.split(rows, [len(own) for own in counts.values()])
    found = dict(zip(tasks, parts, strict=True))
    if shared is not None and config.own_covariance > 0:
        for task in tasks:
            own = _covariance(counts[task], totals[task], sums[f"{GRAM}/{task}"], known)
            mixed = config.own_covariance * own + (1 - config.own_covariance) * shared
            second = _rows(counts[task], means[task], mixed, known, config, named)
            found[task] = torch.stack([found[task], _without_common(second)], dim=1)
    return {task: head.float() for task, head in found.items()}


def _records(count: Tensor, known: SumContext) -> Tensor:
    """Return numbers of records: of noised ones, at least 1."""
    return count.clamp(min=1.0) if known.deviation else count.round()


def _means(
    count: Tensor, total: Tensor, known: SumContext, task: str, config: PrototypeConfig
) -> Tensor:
    """Return class means, ``(labels, size)``: (M62). A label's name counts as some records for each
    deviation of the noise; a label without any has the vector of its name."""
    names = known.names[task].to(total.dtype)
    prior = config.names_noise * known.deviation
    records = count[:, None] + prior
    return torch.where(records > 0, (total + prior * names) / records.clamp(min=SMALLEST), names)


def _without_common(rows: Tensor) -> Tensor:
    """Return rows without what they have in common: it adds the same to the score of every label,
    and would be most of what a format rounds. Labels without records stay out of the mean."""
    shown = rows[:, -1] > ABSENT
    if not bool(shown.any()):
        return rows
    centred = rows - rows[shown].mean(dim=0)
    return torch.where(shown[:, None], centred, rows)


def _covariance(count: Tensor, total: Tensor, gram: Tensor, known: SumContext) -> Tensor:
    """Return a covariance within classes, ``(size, size)``: (M67). Beyond the directions of the
    Gram matrix it is diagonal, that of public texts, on the scale of what was measured."""
    size, measured = total.shape[1], len(gram)
    within = without_negative(scatter(count, total[:, :measured], gram) / count.sum())
    if measured == size:
        return within
    assert known.subspace is not None
    spread = known.subspace.spread
    scale = within.trace() / spread[:measured].sum()
    whole = torch.diag(scale * spread)
    whole[:measured, :measured] = within
    return whole


def _rows(
    count: Tensor,
    means: Tensor,
    within: Tensor | None,
    known: SumContext,
    config: PrototypeConfig,
    named: bool,
) -> Tensor:
    """Return weights and biases, ``(labels, size + 1)``, float64; ``within``: the covariance in
    whose metric class means are compared, None: none."""
    weights, lost = means, torch.zeros_like(count)
    if within is not None:
        size = len(within)
        scarce = (SCARCE * size / float(count.sum().clamp(min=1.0))) ** 2
        ridge = max(float(config.ridge), scarce)
        added = ridge * (within.trace() / size).clamp(min=SMALLEST)
        metric = within + added * torch.eye(size, dtype=within.dtype)
        inverse = torch.linalg.inv(metric)
        weights = means @ inverse
        records = (count + config.names_noise * known.deviation).clamp(min=1.0)
        error = count * (inverse @ within).trace() + known.deviation**2 * inverse.trace()
        lost = 0.5 * error / records.square()  # (M65)
        lost = torch.where(count > 0, lost, 0.0)
    bias = config.few_records * lost - 0.5 * (weights * means).sum(dim=1)
    if not named:
        bias[count == 0] = ABSENT
    return torch.cat([weights, bias[:, None]], dim=1)
