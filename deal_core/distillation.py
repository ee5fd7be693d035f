"""Distillation: a student keeps a teacher's opinions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 * mean over rows of KL(softmax(teacher / T) || softmax(student / T))``.

    Args:
        student: logits ``(rows, classes)``, with gradient.
        teacher: logits of the same shape; treated as constant.
        temperature: ``T > 0``; large values compare whole rankings, 1 the probabilities.

    Returns:
        A scalar; 0 when there are no rows or no classes, or when both agree.

    Source: Hinton et al. 2015 (T^2 keeps the gradient's size); Li & Hoiem 2016 (LwF).
    """
    if student.numel() == 0:
        return student.sum()
    return temperature**2 * kl_div(
        log_softmax(student / temperature, dim=1),
        log_softmax(teacher.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
