"""What a process remembers of its matrix kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deal_core.training.hardware import CACHES, KERNELS, keep_memory

SHAPES = """
import random, torch
from deal_core.training.hardware import keep_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

keep_memory()
torch.set_num_threads(1)
weight, rows = torch.ones(1536, 384, dtype=torch.bfloat16), random.Random(0)
texts = torch.ones(3000, 384, dtype=torch.bfloat16)
for step in range(200):
    torch.nn.functional.linear(texts[: rows.randint(1000, 3000)], weight)
    if step == 100:
        before = resident()
print(resident() - before)
"""


def grown() -> float:
    """MB that 100 products of new shapes leave with a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", SHAPES],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(ran.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_every_new_shape() -> None:
    """Where bfloat16 has kernels of oneDNN's, each kept one holds about a megabyte."""
    assert grown() < 30


def test_a_user_who_sets_a_cache_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.delenv(CACHES[1], raising=False)
    keep_memory()
    assert [os.environ[cache] for cache in CACHES] == ["7", KERNELS]
