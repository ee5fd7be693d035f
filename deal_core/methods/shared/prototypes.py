"""Label heads from class sums: nearest class mean, or linear discriminant analysis with a
covariance within classes, of all tasks and of each. Source: docs/method.md, (M40), (M63), (M65)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deal_core.config.method import PrototypeConfig
from deal_core.lora.state import State
from deal_core.methods.interface import Statistics, SumNoise, Tensors
from deal_core.methods.shared.class_sums import (
    COUNT,
    GRAM,
    ROUNDED,
    SUM,
    check,
    collect,
    filled,
    scatter,
    shapes,
    symmetric,
    without_negative,
)

SMALLEST = 1e-6
"""Mean eigenvalue that a covariance is taken to have at least: of equal texts it is 0."""
SCARCE = 0.2
"""The square of so many times the entries per record is the least ridge: a covariance of few
records is known in few directions, and in all others distances of means are mostly chance."""
ABSENT = -1e9
"""Bias of a label that no client has shown, where heads answer alone: it is never the answer."""


def class_statistics(config: PrototypeConfig, names: float = 0.0) -> Statistics:
    """Return what clients add up, and what the server makes of it.

    Args:
        config: layers of the embeddings, covariance and its ridge.
        names: weight of label names' scores beside those of class means.
    """
    return Statistics(
        shapes=shapes,
        collect=collect,
        check=check,
        absorb=lambda state, totals: absorb(state, totals, config, names > 0),
        once=True,
        layers=config.layers,
        names=names,
        head_rows=2 if _in_two_steps(config) else 1,
        rounded=ROUNDED,
        absorb_noised=(
            (lambda state, totals, noise: absorb_noised(state, totals, noise, config))
            if config.covariance == "none" and config.layers == 1
            else None
        ),
    )


def absorb(
    state: State, totals: Mapping[str, Tensors], config: PrototypeConfig, named: bool = False
) -> State:
    """Server: add the sums of a round, and make all heads anew: see :func:`heads`."""
    sums = dict(state.sums)
    for task, total in totals.items():
        gram = f"{GRAM}/{task}" if _in_two_steps(config) else GRAM
        for key, name in ((f"{COUNT}/{task}", COUNT), (f"{SUM}/{task}", SUM), (gram, GRAM)):
            sums[key] = sums[key] + total[name] if key in sums else total[name]
    return replace(state, sums=sums, heads=heads(sums, config, named))


def _in_two_steps(config: PrototypeConfig) -> bool:
    return config.covariance == "shared" and config.own_covariance > 0


def absorb_noised(
    state: State, totals: Mapping[str, Tensors], noise: SumNoise, config: PrototypeConfig
) -> State:
    """Server: make the heads of tasks from class sums with noise; they have no covariance."""
    made = {
        task: noised_head(
            total[COUNT], total[SUM], noise.names[task], config.names_noise * noise.deviation
        )
        for task, total in totals.items()
    }
    return replace(state, heads={**state.heads, **made})


def noised_head(count: Tensor, total: Tensor, names: Tensor, prior: float) -> Tensor:
    """Return the head of a task, ``(labels, size + 1)``, float32: (M62).

    Args:
        count: records of each label, with noise, ``(labels,)``.
        total: sum of embeddings of each label, with noise, ``(labels, size)``.
        names: vectors of the labels' names, ``(labels, size)``.
        prior: a name counts as so many records.
    """
    records = count.clamp(min=1.0)[:, None] + prior
    means = (total + prior * names.to(total.dtype)) / records
    rows = means / means.norm(dim=1, keepdim=True).clamp(min=SMALLEST)
    return torch.cat([rows, torch.zeros(len(rows), 1, dtype=rows.dtype)], dim=1).float()


def heads(
    sums: Mapping[str, Tensor], config: PrototypeConfig, named: bool = False
) -> dict[str, Tensor]:
    """Return task to its head, float32: (M40), ``(labels, size + 1)``; with a covariance of each
    task's own (M63), ``(labels, 2, size + 1)``.

    Args:
        sums: ``count/TASK`` ``(labels,)``, ``sum/TASK`` ``(labels, size)`` and ``gram/TASK``, its
            upper triangle, of each task; or one ``gram`` of all.
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
    shared = None
    if config.covariance == "shared":
        grams = [value for key, value in sums.items() if key.split("/")[0] == GRAM]
        shared = _covariance(count, total, sum(grams[1:], grams[0]))
    rows = _without_common(_rows(count, torch.cat(list(means.values())), shared, config, named))
    parts = torch.split(rows, [len(own) for own, _ in classes.values()])
    found = dict(zip(classes, parts, strict=True))
    if shared is not None and _in_two_steps(config):
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
