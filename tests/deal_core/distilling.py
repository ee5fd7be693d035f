"""What tests of distillation share: texts, an adapter that has learnt, and the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from deal_core.adapters import Adapter, LoraFactors
from deal_core.data import Example
from deal_core.models import Encoded

LABELS = ("Anatomy", "Surgery")
SEEN = ("Dental", "Skin", "Eye")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("Bones", "Anatomy"),
]


def learnt_adapter(random_adapter, shapes, seed: int) -> Adapter:
    """Factors of the size that training gives them."""
    drawn = random_adapter(shapes, 8, 2.0, seed)
    layers = {n: LoraFactors(f.A * 0.05, f.B * 0.02) for n, f in drawn.layers.items()}
    return Adapter(layers, drawn.scaling)


def divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of scores at temperature 2, for every example."""
    wanted, own = softmax(teacher / 2.0, 1), softmax(student / 2.0, 1)
    return (wanted * (wanted.log() - own.log())).sum(1)


def expected_losses(
    data: Sequence[Encoded], scores: Tensor, divergence: Tensor, weight: float
) -> Tensor:
    """``CE + weight * T^2 KL`` at temperature 2; ``scores`` over the labels that are learnt."""
    targets = torch.tensor([item.target for item in data])
    return cross_entropy(scores, targets, reduction="none") + weight * 4.0 * divergence
