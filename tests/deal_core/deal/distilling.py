"""What tests of distillation share: texts, an adapter that has learnt, and the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from deal_core.data import Example
from deal_core.lora.adapter import Adapter, LoraFactors, zero_adapter
from deal_core.lora.state import State
from deal_core.methods import LocalTask, Method
from deal_core.models import Encoded
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import load_state

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


def first_task(
    minilm, method: Method, shapes, random_adapter, data: Sequence[Encoded]
) -> tuple[Tensor, Tensor, Tensor]:
    """In the middle of the first task, whose teacher is the base model, with ``SEEN`` to come.

    Returns:
        Losses of the method's objective, scores over ``LABELS``, and how far the model has gone
        from the teacher over ``SEEN``; each example by itself.
    """
    empty = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    begun = method.begin_task(empty, seeded(0))
    load_state(minilm, empty)
    with torch.no_grad():
        teacher_logits = minilm.scores(data, SEEN)
    moved = replace(begun, current=learnt_adapter(random_adapter, shapes, 4))
    load_state(minilm, moved)
    task = LocalTask(LABELS, (), future=lambda: (SEEN,))
    objective = method.objective(minilm, moved, task, data, Cache())
    with torch.no_grad():
        losses = objective.example_losses(range(len(data)))
        return (
            losses,
            minilm.scores(data, LABELS),
            divergences(minilm.scores(data, SEEN), teacher_logits),
        )


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
