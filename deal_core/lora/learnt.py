"""What of an adapter learns in a round, as the numbers that are summed over clients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.attach import learning_factors, lora_layers
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


def of_what_learns(
    module: nn.Module, gradients: Mapping[nn.Parameter, Tensor], core: bool
) -> dict[str, Tensor]:
    """Return key to the gradient of what learns, of those of the factors; ``core``: of the
    cores."""
    return {
        key: to_core(gradients[factor], frame) if core and frame is not None else gradients[factor]
        for key, factor, frame in _learning(module)
        if factor in gradients
    }


def learning_by_key(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return key to factor of what learns in a model."""
    return {key: factor for key, factor, _ in _learning(module)}


def learnt_sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns in a model."""
    return {
        key: tuple(factor.shape) if frame is None else (frame.shape[1], frame.shape[1])
        for key, factor, frame in _learning(module)
    }


def _learning(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    """Key, factor and frame (None: the whole factor learns) of what learns in a model."""
    layers = lora_layers(module)
    for name, factor in learning_factors(module).items():
        yield f"{PREFIX}{name}.weight", factor, layers[name.rpartition(".")[0]].frame


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
