"""What of an adapter learns in a round, as the numbers that are summed over clients."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.attach import learning_factors
from deal_core.lora.payload import PREFIX


def learnt_shapes(adapter: Adapter, trained: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns, in the order of the layers."""
    return {
        f"{PREFIX}{name}.{factor}.weight": tuple(tensor.shape)
        for name, factors in adapter.layers.items()
        for factor, tensor in (("lora_A", factors.A), ("lora_B", factors.B))
        if factor in trained
    }


def entries_of(adapter: Adapter, trained: frozenset[str]) -> int:
    """Return how many numbers learn."""
    return sum(math.prod(shape) for shape in learnt_shapes(adapter, trained).values())


def of_what_learns(
    module: nn.Module, gradients: Mapping[nn.Parameter, Tensor]
) -> dict[str, Tensor]:
    """Return key to the gradient of what learns, of those of the factors."""
    return {
        key: gradients[factor]
        for key, factor in learning_by_key(module).items()
        if factor in gradients
    }


def learning_by_key(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return key to factor of what learns in a model."""
    factors = learning_factors(module)
    return {f"{PREFIX}{name}.weight": factor for name, factor in factors.items()}


def learnt_sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns in a model."""
    return {key: tuple(factor.shape) for key, factor in learning_by_key(module).items()}


def changed(adapter: Adapter, change: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter after a change of what learns, by its keys; float32."""

    def after(name: str, factor: str, start: Tensor) -> Tensor:
        part = change.get(f"{PREFIX}{name}.{factor}.weight")
        return start if part is None else (start.double() + part.double()).float()

    layers = {
        name: LoraFactors(after(name, "lora_A", factors.A), after(name, "lora_B", factors.B))
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)
