"""Adapters as arrays under PEFT's keys, and back, checked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PREFIX, Arrays, PayloadError, Template, check_header, check_keys


def to_arrays(adapter: Adapter) -> Arrays:
    """Return the adapter's tensors as float32 arrays under PEFT's keys."""
    arrays: Arrays = {}
    for name, factors in adapter.layers.items():
        arrays[f"{PREFIX}{name}.lora_A.weight"] = factors.A.detach().cpu().numpy()
        arrays[f"{PREFIX}{name}.lora_B.weight"] = factors.B.detach().cpu().numpy()
    return arrays


def from_arrays(
    arrays: Mapping[str, NDArray[np.generic]], template: Template, scaling: float
) -> Adapter:
    """Return the adapter of arrays under PEFT's keys, every one checked.

    Raises:
        PayloadError: a key too many or too few, a wrong dtype or shape, a value that is
            not finite.
    """
    expected = template.expected()
    check_keys(arrays.keys(), expected.keys())
    for key, shape in expected.items():
        check_header(key, str(arrays[key].dtype), arrays[key].shape, shape)
        if not np.isfinite(arrays[key]).all():
            raise PayloadError(f"{key}: a value is not finite")
    return Adapter(
        {
            name: LoraFactors(
                torch.from_numpy(np.array(arrays[f"{PREFIX}{name}.lora_A.weight"], np.float32)),
                torch.from_numpy(np.array(arrays[f"{PREFIX}{name}.lora_B.weight"], np.float32)),
            )
            for name in template.shapes
        },
        scaling,
    )
