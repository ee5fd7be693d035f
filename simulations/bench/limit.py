"""What this machine could do at best: matrix products, and how many of them a step needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

ROWS = 2048
REPEATS = 20


class ProductWork:
    """Matrix products in the shapes of the embedded encoder, nothing else: the work is their
    arithmetic."""

    def __init__(self, precision: str) -> None:
        dtype = getattr(torch, precision)
        sizes = ((384, 384), (384, 1536), (1536, 384))
        self._pairs = [
            (torch.randn(ROWS, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype))
            for d_in, d_out in sizes
        ]

    def window(self) -> Mapping[str, float]:
        """The fastest shape counts: a limit is a limit."""
        rates = [self._rate(x, weight) for x, weight in self._pairs]
        return {"work": max(rates), "seconds": 1.0}

    def report(self) -> Mapping[str, float]:
        """Return no figure beside the rate."""
        return {}

    def _rate(self, x: torch.Tensor, weight: torch.Tensor) -> float:
        spent = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            x @ weight.T
            spent.append(time.perf_counter() - started)
        operations = 2 * x.shape[0] * x.shape[1] * weight.shape[0]
        return operations / statistics.median(spent)


def product_work(precision: str) -> ProductWork:
    """Set up in a process of its own."""
    return ProductWork(precision)


def operations_per_example(tokens: int, batch_size: int) -> float:
    """Return the floating-point operations of one training step, divided by its examples: counted
    on PEFT's own model with plain attention, forward and backward, texts of one length."""
    from torch.utils.flop_counter import FlopCounterMode

    from simulations.bench.step_trainer import LabelEncoder

    model = LabelEncoder(("anatomy", "physiology"), attention="eager")
    ids = torch.full((batch_size, tokens), 1000)
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, torch.ones_like(ids), torch.zeros(batch_size, dtype=torch.long))["loss"]
        loss.backward()
    return float(counter.get_total_flops()) / batch_size
