"""The core adapter: few numbers between frozen, public factors.

A layer's update is ``s * F @ R @ A`` with public, frozen ``F`` (d_out x r) and ``A`` (r x d_in),
both orthonormal, and a learnt core ``R`` (r x r). It is a LoRA adapter of rank ``2 r`` in the end:
the first ``r`` rows of ``lora_A`` are ``A`` and the first columns of ``lora_B`` are ``F R``; the
others are zero rows, and ``F`` itself, so that it travels along and changes nothing. Source:
docs/method.md (M61); Fed-SB, arXiv 2502.15436; LoRA-XS, arXiv 2405.17604.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deal_core.lora.adapter import Adapter, LoraFactors, outside, row_basis

NEGLIGIBLE = 1e-6
"""Singular values below this part of the largest are rounding."""


def core_size(rank: int) -> int:
    """Return how many directions a core has on either side, of an adapter of that rank."""
    return rank // 2


def begin_core(current: Adapter, gradients: Mapping[str, Tensor], retained: Adapter) -> Adapter:
    """Return the adapter that a task begins with: a core of zeros between the directions in which
    public texts would move a layer most, outside of what is retained.

    Args:
        current: any, of the even rank and the scaling that are kept.
        gradients: layer name to the gradient of its weight on public texts, ``(d_out, d_in)``.
        retained: whose inputs are left out.
    """
    size = core_size(current.rank)
    layers = {}
    for name, factors in current.layers.items():
        gradient = outside(gradients[name].double(), row_basis(retained.layers[name].A))
        u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
        live = int((s > NEGLIGIBLE * s[0]).sum()) if s[0] > 0 else 0
        kept = min(size, live)
        A, B = torch.zeros_like(factors.A), torch.zeros_like(factors.B)
        A[:kept] = vh[:kept].float()
        B[:, size : size + kept] = u[:, :kept].float()
        layers[name] = LoraFactors(A, B)
    return Adapter(layers, current.scaling)


def frame_of(factors: LoraFactors) -> Tensor:
    """Return ``F``, ``(d_out, r)``; columns of zeros where a layer has fewer directions."""
    return factors.B[:, core_size(factors.B.shape[1]) :]


def core_shape(factors: LoraFactors) -> tuple[int, int]:
    """Return the shape of the core of a layer."""
    size = core_size(factors.B.shape[1])
    return size, size


def to_core(B: Tensor, frame: Tensor) -> Tensor:
    """Return the core, ``(r, r)``, of ``lora_B``, or the core's gradient of that of ``lora_B``."""
    return frame.T @ B[:, : core_size(B.shape[1])]


def from_core(change: Tensor, factors: LoraFactors) -> Tensor:
    """Return the change of ``lora_B`` that a change of the core is."""
    whole = torch.zeros_like(factors.B)
    learnt = frame_of(factors).double() @ change.double()
    whole[:, : learnt.shape[1]] = learnt.float()
    return whole


def within_frame(B: Tensor, frame: Tensor) -> Tensor:
    """Return ``F F^T B``, also of copies for every example: gradients stay within the frame."""
    return frame @ (frame.T @ B)
