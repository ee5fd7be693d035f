"""What a task changes, as the model holds it now: what the controlled update is priced by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from deal_core.adapters import Adapter, LoraFactors
from deal_core.attach import CURRENT, lora_layers


def beside_current(residual: Adapter | None, device: torch.device) -> dict[str, LoraFactors]:
    """Return layer name to the residual's factors, scaling included."""
    if residual is None:
        return {}
    return {
        name: LoraFactors(f.A.to(device), (residual.scaling * f.B).to(device))
        for name, f in residual.layers.items()
    }


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
