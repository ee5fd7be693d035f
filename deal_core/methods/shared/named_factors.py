"""The factors of an adapter by ``LAYER.lora_A`` and ``LAYER.lora_B``."""

from __future__ import annotations

import torch

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.methods.interface import Tensors


def named(adapter: Adapter, device: torch.device) -> Tensors:
    """Return the factors of an adapter on a device, its scaling left out."""
    tensors = {}
    for name, factors in adapter.layers.items():
        tensors[f"{name}.lora_A"] = factors.A.to(device)
        tensors[f"{name}.lora_B"] = factors.B.to(device)
    return tensors


def unnamed(tensors: Tensors, like: Adapter) -> Adapter:
    """Undo :func:`named`; ``like`` has the layers and the scaling."""
    layers = {n: LoraFactors(tensors[f"{n}.lora_A"], tensors[f"{n}.lora_B"]) for n in like.layers}
    return Adapter(layers, like.scaling)
