"""Ctrl-C and SIGTERM: one way to stop, and a moment in which nothing may interrupt."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM raise KeyboardInterrupt.

    Also where Ctrl-C was ignored, as shells arrange for what they start in the background.
    """
    with _handled(signal.default_int_handler, SIGNALS):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block both signals are ignored: what was started is being stopped."""
    with _handled(signal.SIG_IGN, SIGNALS):
        yield


@contextmanager
def deferred() -> Iterator[None]:
    """Let both signals wait for the end of the block, for whoever handles them outside. Ignored or
    blocked they would be so in every process that is started in it.
    """
    came: list[int] = []
    try:
        with _handled(lambda number, frame: came.append(number), SIGNALS):
            yield
    finally:
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Within the block Ctrl-C is ignored, and by what is started in it ever after."""
    with _handled(signal.SIG_IGN, (signal.SIGINT,)):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers,
    numbers: Sequence[signal.Signals],
) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)
