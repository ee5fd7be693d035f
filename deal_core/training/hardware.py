"""What the machine decides: threads, memory that is kept, and the precision of the frozen model."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deal_core.config.experiment import TrainConfig


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses ``count`` threads.

    A QR of a few hundred numbers is many times slower on two threads than on one, and the
    more so the busier the machine is.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names and values of glibc's malloc.h."""
KEEP_BYTES = 2**31 - 1
BLOCK_BYTES = 2**30
PAD_BYTES = 2**26
KERNELS = "32"
"""Compiled matrix kernels that are kept; the default of both caches is 1,024."""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN, and of the layer by which torch calls it, which keeps what oneDNN has dropped."""


def keep_memory() -> None:
    """Keep few compiled kernels, and freed blocks; call it before the first product.

    A kernel of oneDNN is compiled for every shape and kept with its buffers. Texts of many lengths
    have many shapes: in bfloat16 a third of the memory of a run and more, and no time is saved
    (measured). And by default glibc maps and unmaps each tensor above 32 MB at most, and every page
    of it is cleared by the kernel on first touch: a sixth of a float32 training step on a small
    model, and two thirds of attention alone. So large blocks come from its heap, which is kept.
    """
    for cache in CACHES:
        os.environ.setdefault(cache, KERNELS)
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    mallopt(M_TOP_PAD, PAD_BYTES)


def compute_dtype(
    config: TrainConfig, device: torch.device, needs_float32: bool = False
) -> torch.dtype:
    """Return bfloat16 where asked, or where ``auto`` finds hardware that multiplies it fast.

    The frozen weights and the activations take this type; adapters, their optimiser, losses
    and whatever is compared or aggregated stay float32. Under a privacy mechanism
    (``needs_float32``) ``auto`` is float32: in bfloat16 each record has a pass of its own
    (:mod:`deal_core.privacy.record_gradients`), which is faster for generating models alone.
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
