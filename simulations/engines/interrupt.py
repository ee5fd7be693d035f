"""Ctrl-C and SIGTERM: the first stops and says what it waits for, a second ends at once; and
moments in which nothing may interrupt."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 130
"""Exit code of what was interrupted."""
_came: list[int] = []
"""Signals that have come since the last block began that is stoppable."""


@contextmanager
def stoppable(waits: str) -> Iterator[None]:
    """Within the block the first Ctrl-C or SIGTERM says what it ``waits`` for and raises
    KeyboardInterrupt; a second ends this process and all that it has started.

    Also where Ctrl-C was ignored, as shells arrange for what they start in the background.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _end_if_asked_twice(number)
        os.write(2, f"\nstopping: {waits}; Ctrl-C again ends at once\n".encode())
        raise KeyboardInterrupt

    _came.clear()
    with _handled(stop, SIGNALS):
        yield


def _end_if_asked_twice(number: int, frame: FrameType | None = None) -> None:
    _came.append(number)
    if len(_came) > 1:
        import psutil

        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
        os._exit(STOPPED)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block what was started is being stopped: one signal is as good as none."""
    with _handled(_end_if_asked_twice, SIGNALS):
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
