"""Steps of an optimiser at the server, on a gradient that clients have added up.

What is remembered between steps stays at the server. Source: docs/method.md (M59); Reddi et al.,
ICLR 2021 (optimisers at the server).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PREFIX
from deal_core.lora.state import State

VELOCITY = "step/velocity/"
"""Of names in ``State.sums``, before the key of a factor."""


def begin_steps(state: State) -> State:
    """Return the state without memory of earlier steps."""
    return replace(state, sums={k: v for k, v in state.sums.items() if not k.startswith(VELOCITY)})


def momentum_step(
    state: State, gradient: Mapping[str, Tensor], learning_rate: float, momentum: float
) -> State:
    """Return the state after one step of gradient descent with momentum: ``v <- m v + g``,
    ``x <- x - l v``.

    Args:
        state: ``current`` is moved; ``sums`` holds the velocity.
        gradient: key of a trained factor to its mean gradient, float64.
        learning_rate: ``l``.
        momentum: ``m``.
    """
    sums = dict(state.sums)
    moved: dict[str, Tensor] = {}
    factors = _factors(state.current)
    for key, g in gradient.items():
        before = sums.get(VELOCITY + key)
        velocity = g.double() if before is None else momentum * before + g.double()
        sums[VELOCITY + key] = velocity
        moved[key] = factors[key].double() - learning_rate * velocity
    return replace(state, current=_with(state.current, moved), sums=sums)


def _factors(adapter: Adapter) -> dict[str, Tensor]:
    factors = {}
    for name, layer in adapter.layers.items():
        factors[f"{PREFIX}{name}.lora_A.weight"] = layer.A
        factors[f"{PREFIX}{name}.lora_B.weight"] = layer.B
    return factors


def _with(adapter: Adapter, moved: Mapping[str, Tensor]) -> Adapter:
    """The adapter with some factors replaced, in float32."""
    layers = {
        name: LoraFactors(
            moved.get(f"{PREFIX}{name}.lora_A.weight", layer.A).float(),
            moved.get(f"{PREFIX}{name}.lora_B.weight", layer.B).float(),
        )
        for name, layer in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)
