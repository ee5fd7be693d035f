"""Label heads from class sums: nearest class mean, or linear discriminant analysis with one
covariance within classes. Source: docs/method.md, (M40)."""

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
    scatter,
    shapes,
    symmetric,
    without_negative,
)

SMALLEST = 1e-6
"""Mean eigenvalue that a covariance is taken to have at least: of equal texts it is 0."""
ABSENT = -1e9
"""Bias of a label that no client has shown: it is never the answer."""


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
        absorb=lambda state, totals: absorb(state, totals, config),
        once=True,
        layers=config.layers,
        names=names,
        rounded=ROUNDED,
        absorb_noised=(
            (lambda state, totals, noise: absorb_noised(state, totals, noise, config))
            if config.covariance == "none" and config.layers == 1
            else None
        ),
    )


def absorb(state: State, totals: Mapping[str, Tensors], config: PrototypeConfig) -> State:
    """Server: add the sums of a round, and make all heads anew: the covariance is shared."""
    sums = dict(state.sums)
    for task, total in totals.items():
        for key, name in ((f"{COUNT}/{task}", COUNT), (f"{SUM}/{task}", SUM), (GRAM, GRAM)):
            sums[key] = sums[key] + total[name] if key in sums else total[name]
    return replace(state, sums=sums, heads=heads(sums, config))


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


def heads(sums: Mapping[str, Tensor], config: PrototypeConfig) -> dict[str, Tensor]:
    """Return task to its head, ``(labels, size + 1)``, float32: (M40).

    Args:
        sums: ``count/TASK`` ``(labels,)`` and ``sum/TASK`` ``(labels, size)`` of each task, and
            ``gram`` of all, its upper triangle.
        config: which covariance, and its ridge.
    """
    prefix = f"{COUNT}/"
    tasks = [key.removeprefix(prefix) for key in sums if key.startswith(prefix)]
    count = torch.cat([sums[f"{COUNT}/{task}"] for task in tasks])
    total = torch.cat([sums[f"{SUM}/{task}"] for task in tasks])
    means = total / count.clamp(min=1.0)[:, None]
    weights = means
    if config.covariance == "shared":
        size = total.shape[1]
        within = scatter(count, total, symmetric(sums[GRAM], size)) / count.sum()
        within = without_negative(within)
        mean_eigenvalue = (within.trace() / size).clamp(min=SMALLEST)
        within += config.ridge * mean_eigenvalue * torch.eye(size, dtype=within.dtype)
        weights = torch.linalg.solve(within, means.T).T
    bias = -0.5 * (weights * means).sum(dim=1)
    bias[count == 0] = ABSENT
    rows = torch.cat([weights, bias[:, None]], dim=1).float()
    sizes = [len(sums[f"{COUNT}/{task}"]) for task in tasks]
    return dict(zip(tasks, torch.split(rows, sizes), strict=True))
