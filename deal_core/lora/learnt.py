"""What of an adapter learns in a round, as the numbers that are summed over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.attach import factors_in, lora_layers
from deal_core.lora.core import core_shape, from_core, to_core
from deal_core.lora.payload import PREFIX


def learnt_shapes(
    adapter: Adapter, trained: frozenset[str], core: bool
) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns, in the order of the layers; ``core``: of the cores."""
    return {
        f"{PREFIX}{name}.{factor}.weight": core_shape(factors) if core else tuple(tensor.shape)
        for name, factors in adapter.layers.items()
        for factor, tensor in (("lora_A", factors.A), ("lora_B", factors.B))
        if factor in trained
    }


def entries_of(adapter: Adapter, trained: frozenset[str], core: bool) -> int:
    """Return how many numbers learn."""
    return sum(math.prod(shape) for shape in learnt_shapes(adapter, trained, core).values())


def learnt_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Return key to the gradient of what learns; None: there is none."""
    layers = lora_layers(module)
    found: dict[str, Tensor | None] = {}
    for name, factor in factors_in(module).items():
        if factor.requires_grad:
            frame = getattr(layers[name.rpartition(".")[0]], "frame", None)
            gradient = factor.grad
            if gradient is not None and frame is not None:
                gradient = to_core(gradient, frame)
            found[f"{PREFIX}{name}.weight"] = gradient
    return found


def learnt_sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns in a model."""
    layers, found = lora_layers(module), {}
    for name, factor in factors_in(module).items():
        if factor.requires_grad:
            frame = getattr(layers[name.rpartition(".")[0]], "frame", None)
            size = factor.shape[1] // 2
            shape = tuple(factor.shape) if frame is None else (size, size)
            found[f"{PREFIX}{name}.weight"] = shape
    return found


def changed(adapter: Adapter, change: Mapping[str, Tensor], core: bool) -> Adapter:
    """Return the adapter after a change of what learns, by its keys; float32."""

    def after(name: str, factor: str, factors: LoraFactors, start: Tensor) -> Tensor:
        part = change.get(f"{PREFIX}{name}.{factor}.weight")
        if part is None:
            return start
        whole = from_core(part, factors) if core else part
        return (start.double() + whole.double()).float()

    layers = {
        name: LoraFactors(
            after(name, "lora_A", factors, factors.A), after(name, "lora_B", factors, factors.B)
        )
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)
