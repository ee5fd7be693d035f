"""Large tensors come and go with every step: keep their memory instead of asking for it anew."""

from __future__ import annotations

import ctypes
import os
import sys

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
    """Keep freed blocks, and few compiled kernels; call it before the first product."""
    _keep_freed_blocks()
    _keep_few_kernels()


def _keep_few_kernels() -> None:
    """Bound what oneDNN and torch remember of its kernels, unless the user has.

    A kernel is compiled for every shape and kept with its buffers. Texts of many lengths have
    many shapes: in bfloat16 a third of the memory of a run and more, and no time is saved
    (measured).
    """
    for cache in CACHES:
        os.environ.setdefault(cache, KERNELS)


def _keep_freed_blocks() -> None:
    """Tell glibc to serve large blocks from its heap and to keep the heap; nothing elsewhere.

    By default each tensor above 32 MB at most is mapped and unmapped, and every page of it is
    cleared by the kernel on first touch: a sixth of a float32 training step on a small model,
    and two thirds of attention alone. The peak is what it was; what is freed stays with the
    process.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    mallopt(M_TOP_PAD, PAD_BYTES)
