"""An adapter by PEFT's keys (``base_model.model.LAYER.lora_A.weight``): tensors and arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.lora.adapter import Adapter, LoraFactors, Shapes, zero_adapter
from deal_core.lora.payload import (
    PREFIX,
    Arrays,
    Header,
    PayloadError,
    check_headers,
    factor_of,
)


def by_key(adapter: Adapter) -> dict[str, Tensor]:
    """Return key to factor, in the order of the layers; the scaling is left out."""
    tensors = {}
    for name, factors in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.B
    return tensors


def with_factors(like: Adapter, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter ``like`` with the factors in ``tensors``, by key, in place of its own."""
    layers = {
        name: LoraFactors(
            tensors.get(f"{PREFIX}{name}.lora_A.weight", own.A),
            tensors.get(f"{PREFIX}{name}.lora_B.weight", own.B),
        )
        for name, own in like.layers.items()
    }
    return Adapter(layers, like.scaling)


def changed(adapter: Adapter, change: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter after a change of some factors, by key; float32."""
    before = by_key(adapter)
    after = {key: (before[key].double() + own.double()).float() for key, own in change.items()}
    return with_factors(adapter, after)


def learnt_shapes(adapter: Adapter, trained: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns."""
    return {k: tuple(t.shape) for k, t in by_key(adapter).items() if factor_of(k) in trained}


def to_arrays(adapter: Adapter) -> Arrays:
    """Return key to factor as float32 arrays."""
    return {key: factor.detach().cpu().numpy() for key, factor in by_key(adapter).items()}


def from_arrays(
    arrays: Mapping[str, NDArray[np.generic]], shapes: Shapes, rank: int, scaling: float
) -> Adapter:
    """Return the adapter of arrays by key, every one checked.

    Raises:
        PayloadError: a key too many or too few, a wrong dtype or shape, a value that is
            not finite.
    """
    like = zero_adapter(shapes, rank, scaling)
    expected = {k: Header("float32", tuple(each.shape)) for k, each in by_key(like).items()}
    check_headers(arrays, expected)
    for key in expected:
        if not np.isfinite(arrays[key]).all():
            raise PayloadError(f"{key}: a value is not finite")
    tensors = {key: torch.from_numpy(np.array(arrays[key], np.float32)) for key in expected}
    return with_factors(like, tensors)
