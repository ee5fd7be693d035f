"""How many threads torch uses: many for the model, one for small matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
