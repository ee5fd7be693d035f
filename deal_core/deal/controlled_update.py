"""Controlled update: what a change of the model costs, by what it does to retained directions.

Source: docs/method.md (M14), (M15). The penalty reads no data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.config.experiment import UpdateConfig
from deal_core.lora.adapter import Adapter, LoraFactors, spectrum, strong_part
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State

NEGLIGIBLE = 1e-3
"""Retained directions below this part of a layer's strongest are not protected: relative to
their strength, any change would be immense."""


@dataclass(frozen=True)
class Anchor:
    """What is retained of one layer, as directions.

    Attributes:
        U: ``(d_out, k)``. S: ``(k,)``, positive, descending. V: ``(d_in, k)``. ``k`` is 0
            where nothing is retained.
    """

    U: Tensor
    S: Tensor
    V: Tensor


def make_anchors(retained: Adapter, device: torch.device) -> dict[str, Anchor]:
    """Return layer name to anchor, float32, on ``device``: one thin SVD a layer."""
    anchors = {}
    for name, factors in retained.layers.items():
        parts = strong_part(spectrum(factors, retained.scaling), NEGLIGIBLE)
        directions = parts.U, parts.S, parts.Vh.T
        anchors[name] = Anchor(*(part.to(device, torch.float32) for part in directions))
    return anchors


def update_penalty(
    updates: Mapping[str, LoraFactors], anchors: Mapping[str, Anchor], config: UpdateConfig
) -> Tensor:
    """Return the mean over layers of :func:`layer_penalty`, a scalar (M15).

    The mean, not the sum: the weights then mean the same for a model of any depth. ``updates`` are
    factors of ``Delta = B A``, scaling included.
    """
    costs = [layer_penalty(update, anchors[name], config) for name, update in updates.items()]
    return torch.stack(costs).mean()


def layer_penalty(update: LoraFactors, anchor: Anchor, config: UpdateConfig) -> Tensor:
    """Return ``lambda1 sum_k w_k iota_k^2 + lambda2 ||Delta (I - V V^T)||_F^2``, a scalar.

    ``iota_k = (||Delta v_k||^2 + ||u_k^T Delta||^2)^(1/2) / sigma_k`` is the interference (M14)
    with retained direction ``k`` relative to its strength (1: as large as what is retained), ``w_k
    = sigma_k / sum sigma``. Where nothing is retained, the second term is all. Cost ``O((d_out +
    d_in) r (r + k))``; differentiable in both factors, with gradient 0 at ``Delta = 0``.
    """
    along = update.A @ anchor.V
    entering = (update.B @ along).square().sum(dim=0)
    leaving = (anchor.U.T @ update.B @ update.A).square().sum(dim=1)
    weights = anchor.S / anchor.S.sum()
    interference = (entering + leaving) / anchor.S.square()
    free = update.A - along @ anchor.V.T
    free_size = ((update.B.T @ update.B) * (free @ free.T)).sum().clamp(min=0.0)  # rounding
    return config.lambda1 * (weights * interference).sum() + config.lambda2 * free_size


def beside_current(state: State, device: torch.device) -> dict[str, LoraFactors]:
    """Return layer name to factors of what changed beside the current adapter, scaling included."""
    beside = state.delta_since_task_start()
    if beside is None:
        return {}
    return {n: LoraFactors(f.A.to(device), f.B.to(device)) for n, f in beside.layers.items()}


def live_update(module: nn.Module, beside: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return layer name to factors of what the task changes, scaling included, with gradient."""
    update = {}
    for name, layer in lora_layers(module).items():
        A = layer.lora_A[CURRENT].weight
        B = layer.scaling[CURRENT] * layer.lora_B[CURRENT].weight
        if name in beside:
            A = torch.cat([A, beside[name].A], dim=0)
            B = torch.cat([B, beside[name].B], dim=1)
        update[name] = LoraFactors(A, B)
    return update
