"""What this machine could do at best: matrix products, and how many of them a step needs."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping, Sequence

import torch

ROWS = 2048
REPEATS = 20
Sizes = Sequence[tuple[int, int]]
"""Inputs and outputs of linear layers."""
ENCODER_SIZES: Sizes = ((384, 384), (384, 1536), (1536, 384))
"""Of the embedded encoder."""


class ProductWork:
    """Matrix products in the shapes of a model's layers, nothing else: the work is their
    arithmetic."""

    def __init__(self, precision: str, sizes: Sizes) -> None:
        dtype = getattr(torch, precision)
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


def product_work(precision: str, sizes: Sizes = ENCODER_SIZES) -> ProductWork:
    """Set up in a process of its own."""
    return ProductWork(precision, sizes)


def causal_sizes(name: str) -> Sizes:
    """Return inputs and outputs of a causal model's layers."""
    from transformers import AutoConfig

    from deal_core.models.loading import pretrained

    config = pretrained(AutoConfig, name)
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size)
    hidden = config.hidden_size
    return ((hidden, hidden), (hidden, wide), (wide, hidden))


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


def causal_operations(name: str, tokens: int) -> float:
    """Return the floating-point operations of one training step on a sequence of so many tokens:
    counted on PEFT's own model, all layers adapted, plain attention, forward and backward; no
    weights are read."""
    from peft import get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    from deal_core.config.experiment import ModelConfig
    from deal_core.models.causal import causal_skeleton
    from simulations.bench.causal_trainer import lora_config

    base = causal_skeleton(ModelConfig(family="causal-lm", name=name))
    base.set_attn_implementation("eager")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's own
        model = get_peft_model(base, lora_config())
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.zeros(1, 1, tokens, tokens)  # of this form it is taken as it is
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return float(counter.get_total_flops())
