"""Imports of large libraries in half the time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Within the block nothing looks for garbage; where it has imported something, what is there at
    its end never is any.

    Torch, transformers and PEFT leave a million objects that stay. Python's collector would go
    through them again and again while they come, and once more when the process ends: a third of
    the time that ``deal check`` takes (measured).
    """
    was_on, imported = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > imported:
            gc.freeze()
        if was_on:
            gc.enable()
