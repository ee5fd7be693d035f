"""The server's clock and threads, for runs without a language model."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture
def now(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The server's clock: waiting takes no time, and computing takes none of it. Where a module has
    a ``HASTE``, a sleep lasts so many times as long."""
    from server import clients, wire

    now, haste = [0.0], getattr(request.module, "HASTE", 1.0)
    clock = SimpleNamespace(
        monotonic=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + haste * seconds),
    )
    for module in (clients, wire):
        monkeypatch.setattr(module, "time", clock)
    return now


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are computed in one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
