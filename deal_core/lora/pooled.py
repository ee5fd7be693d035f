"""The pooled adapter of an encoder: LoRA on an identity map behind the pooling of token states.

The frozen map ``I`` (d x d) takes a text's pooled unit vector ``e``; its update is
``s * lora_B @ lora_A``. ``lora_B`` is public and frozen for a task: an orthonormal basis of the
task's centred label vectors, outside of those of earlier tasks. So what a task learns moves scores
along its own labels alone, the mean of ``lora_A`` over clients is exact, and few numbers learn.
Source: docs/method.md (M56), (M57).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deal_core.lora.adapter import Adapter, LoraFactors, outside

POOLED = "pooled"
"""Name of the map among the layers of a model."""
NEGLIGIBLE = 1e-6
"""Singular values of centred unit vectors below this are rounding."""


def add_pooled_map(base: nn.Module) -> None:
    """Give the base model the frozen identity, in float32, that the adapter changes."""
    first = next(base.parameters())
    size: int = getattr(base, "config").hidden_size  # noqa: B009 - not every module has one
    identity = nn.Linear(size, size, bias=False, device=first.device, dtype=torch.float32)
    if first.device.type != "meta":
        nn.init.eye_(identity.weight)
    base.add_module(POOLED, identity.requires_grad_(False))


def begin_pooled(current: Adapter, labels: Tensor, earlier: Tensor) -> Adapter:
    """Return the adapter that a task begins with: ``lora_A`` zero, ``lora_B`` the label basis.

    Its rank ``k`` is the number of directions, so that nothing else is learnt, sent or hidden by
    noise. Whoever is sent an adapter scales it by ``lora_alpha / k``; ``lora_B`` is ``k / rank``
    long, so that what is learnt counts as much for every task.

    Args:
        current: any, of the largest rank, and of the scaling that belongs to it.
        labels: unit vectors of the names of the task's labels, ``(labels, d)``.
        earlier: those of all earlier tasks, ``(any, d)``.
    """
    basis = label_basis(labels, earlier, current.rank)
    size, share = basis.shape[1], basis.shape[1] / current.rank
    layers = {
        name: LoraFactors(factors.A.new_zeros(size, factors.A.shape[1]), share * basis)
        for name, factors in current.layers.items()
    }
    return Adapter(layers, current.scaling / share)


def map_behind(adapter: Adapter) -> Tensor:
    """Return the map that takes a text's pooled unit vector ``e`` to ``W e``, ``(d, d)``, float32:
    the identity and its update (M57).

    Args:
        adapter: of the pooled map alone, all tasks together.
    """
    factors = adapter.layers[POOLED]
    update = adapter.scaling * factors.B.double() @ factors.A.double()
    return (torch.eye(len(update), dtype=torch.float64) + update).float()


def label_basis(labels: Tensor, earlier: Tensor, rank: int) -> Tensor:
    """Return orthonormal columns, ``(d, k)``, float32: (M56); one column of zeros where the labels
    have no direction of their own.

    Args:
        labels: of the task, ``(labels, d)``.
        earlier: of all earlier tasks, whose directions are left out.
        rank: at most so many directions, the strongest.
    """
    centred = _centred(labels)
    if len(earlier):
        centred = outside(centred, _strongest_first(_centred(earlier)))
    own = _strongest_first(centred)[:rank]
    return own.T.float() if len(own) else torch.zeros(labels.shape[1], 1)


def _centred(labels: Tensor) -> Tensor:
    return labels.double() - labels.double().mean(dim=0)


def _strongest_first(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows, the strongest first; the sign of each is fixed by
    its largest entry."""
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = vh[s > NEGLIGIBLE]
    peak = kept.abs().argmax(dim=1, keepdim=True)
    return kept * torch.where(kept.gather(1, peak) < 0, -1.0, 1.0)
