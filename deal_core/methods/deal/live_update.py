"""What a task changes, as the model holds it now: what the controlled update is priced by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from deal_core.lora.adapter import LoraFactors
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State


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
