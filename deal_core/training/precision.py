"""In which precision the frozen model computes."""

from __future__ import annotations

import torch

from deal_core.config.experiment import TrainConfig


def compute_dtype(
    config: TrainConfig, device: torch.device, needs_float32: bool = False
) -> torch.dtype:
    """Return bfloat16 where asked, or where ``auto`` finds hardware that multiplies it fast.

    The frozen weights and the activations take this type; adapters, their optimiser, losses
    and whatever is compared or aggregated stay float32. Where a privacy mechanism needs it
    ``auto`` is float32: in bfloat16 the rounding of a gradient depends on the examples beside it
    by a hundredth of the clipping bound, which no noise accounts for.
    """
    if config.precision == "auto" and needs_float32:
        return torch.float32
    if config.precision == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 fast: CUDA from Ampere on; on processors tile
    units (AMX) or dot products (AVX-512 BF16), without which it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(able.get(unit, False) for unit in ("amx_bf16", "avx512_bf16"))
