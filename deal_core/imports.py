"""Imports of large libraries in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Within the block nothing looks for garbage.

    Torch, transformers and PEFT leave a million objects that stay. Python's collector would go
    through them again and again while they come (measured: a quarter of ``deal check``).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
