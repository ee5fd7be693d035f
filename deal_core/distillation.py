"""Distillation: a student keeps a teacher's opinions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def distillation_losses(
    student: Tensor, teacher: Tensor, temperature: float, rows: Sequence[int]
) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, a value per example.

    Args:
        student: logits ``(rows, classes)``, with gradient.
        teacher: logits of the same shape; treated as constant.
        temperature: ``T > 0``; large values compare whole rankings, 1 the probabilities.
        rows: how many rows each example has, at least one; its loss is their mean.

    Returns:
        ``(examples,)``; 0 where there are no classes, or where both agree.

    Source: Hinton et al. 2015 (T^2 keeps the gradient's size); Li & Hoiem 2016 (LwF).
    """
    divergence = kl_div(
        log_softmax(student / temperature, dim=1),
        log_softmax(teacher.detach() / temperature, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    return temperature**2 * mean_per_example(divergence, rows)


def mean_per_example(values: Tensor, rows: Sequence[int]) -> Tensor:
    """``(sum of rows,)`` to ``(examples,)``."""
    if len(rows) == values.shape[0]:
        return values
    return torch.stack([part.mean() for part in torch.split(values, list(rows))])
