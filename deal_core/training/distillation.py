"""Distillation: a student keeps a teacher's opinions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from deal_core.models import ForwardOutput


def distillation_losses(
    student: ForwardOutput, teacher: Tensor, temperature: float, weights: Sequence[float] = ()
) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, a value per example: the
    weighted sum over the spaces in which a choice is made; without weights their mean.

    Args:
        student: logits ``(rows, classes)``, with gradient; an example's loss is the mean of its
            rows.
        teacher: logits of the same shape; treated as constant.
        temperature: ``T > 0``; large values compare whole rankings, 1 the probabilities.
        weights: one for each space.

    Returns:
        ``(examples,)``; 0 where there are no classes, or where both agree. What the logits of
        one space have in common is free.

    Source: docs/method.md (M16) to (M18); Hinton et al. 2015 (T^2 keeps the gradient's size); Li &
    Hoiem 2016 (LwF: each earlier task has a softmax of its own).
    """
    logits, spaces = student.distillation_logits, list(student.spaces)
    divergence = torch.zeros(logits.shape[0], device=logits.device)
    parts = torch.split(logits, spaces, dim=1), torch.split(teacher.detach(), spaces, dim=1)
    shares = weights or [1 / max(1, len(spaces))] * len(spaces)
    for share, own, wanted in zip(shares, *parts, strict=True):
        divergence = divergence + share * kl_div(
            log_softmax(own / temperature, dim=1),
            log_softmax(wanted / temperature, dim=1),
            reduction="none",
            log_target=True,
        ).sum(dim=1)
    return temperature**2 * mean_per_example(divergence, student.rows)


def mean_per_example(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the mean over each example's rows: ``(sum of rows,)`` to ``(examples,)``."""
    if len(rows) == values.shape[0]:
        return values
    return torch.stack([part.mean() for part in torch.split(values, list(rows))])


def joint_labels(spaces: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return all labels as one space, each once."""
    return tuple(dict.fromkeys(chain.from_iterable(spaces)))
