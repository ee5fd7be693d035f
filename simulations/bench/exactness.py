"""How exact every rule is: relative error against a dense float64 oracle, per setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deal_core.aggregation import (
    AGGREGATION_RULES,
    LORA_A,
    LORA_B,
    Aggregate,
    AggregationRule,
    ClientUpdate,
    make_rule,
)
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors, Shapes
from deal_core.randomness import seeded
from deal_core.training.threads import threads

ALPHA = 16.0
SQUARE = {"query": (256, 256), "value": (256, 256)}
NON_SQUARE = {"up": (512, 128), "down": (128, 512)}


@dataclass(frozen=True)
class Setting:
    """One kind of federation.

    Attributes:
        drift: size of the clients' own movement; 1 is that of the adapter itself.
        new: the round starts from a new adapter, whose ``B`` is zero.
        ranks: dealt out in turn to clients that have no common start; empty: the server's rank.
    """

    name: str
    clients: int
    drift: float
    shapes: Shapes
    new: bool = False
    ranks: tuple[int, ...] = ()


SETTINGS = (
    Setting("new adapter, 4 clients", 4, 0.1, SQUARE, new=True),
    Setting("small drift, 20 clients", 20, 0.01, SQUARE),
    Setting("large drift, 50 clients", 50, 1.0, SQUARE),
    Setting("non-square, 50 clients", 50, 1.0, NON_SQUARE),
    Setting("ranks 2 to 16, 20 clients", 20, 1.0, SQUARE, ranks=(2, 4, 8, 16)),
)
SEEDS = (0, 1, 2)


def table() -> str:
    """Return rule × setting as Markdown: the largest error over seeds; ``–`` where the rule does
    not mix ranks."""
    lines = [
        "| rule | " + " | ".join(setting.name for setting in SETTINGS) + " |",
        "|---|" + "---:|" * len(SETTINGS),
    ]
    with threads(1):
        for name in AGGREGATION_RULES:
            cells = [worst(name, setting) for setting in SETTINGS]
            lines.append(f"| `{name}` | " + " | ".join(map(_written, cells)) + " |")
    return "\n".join(lines)


def worst(name: str, setting: Setting) -> float | None:
    """Return the largest relative error of a rule; None where it cannot mix ranks."""
    rule = make_rule(AggregationConfig(rule=name))
    if setting.ranks and not rule.mixed_ranks:
        return None
    return max(one_round(rule, setting, seed) for seed in SEEDS)


def one_round(rule: AggregationRule, setting: Setting, seed: int) -> float:
    """Return the relative error of one random round."""
    generator = seeded("exactness", setting.name, seed)
    before = starting_point(setting, generator)
    updates = replies(setting, before, rule.trained(1), generator)
    aggregation = rule.begin(before, 1)
    for update in updates:
        aggregation.add(update)
    return dense_error(aggregation.finish(), updates)


def starting_point(setting: Setting, generator: torch.Generator) -> Adapter:
    """Return what the round starts from; its rank is the largest of the clients'."""
    rank = max(setting.ranks, default=8)
    layers = {name: _random(rank, shape, generator) for name, shape in setting.shapes.items()}
    if setting.new:
        layers = {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in layers.items()}
    return Adapter(layers, ALPHA / rank)


def replies(
    setting: Setting, before: Adapter, trained: frozenset[str], generator: torch.Generator
) -> list[ClientUpdate]:
    """Return the clients' updates, with weights from 1 to 1000 examples."""
    updates = []
    for client in range(setting.clients):
        rank = setting.ranks[client % len(setting.ranks)] if setting.ranks else before.rank
        layers = {n: _random(rank, shape, generator) for n, shape in setting.shapes.items()}
        if not setting.ranks:
            layers = {
                n: _moved(before.layers[n], drift, setting.drift, trained)
                for n, drift in layers.items()
            }
        weight = float(torch.randint(1, 1001, (), generator=generator))
        updates.append(ClientUpdate(str(client), Adapter(layers, ALPHA / rank), weight))
    return updates


def dense_error(result: Aggregate, updates: Sequence[ClientUpdate]) -> float:
    """Return ``||result - ideal||_F / ||ideal||_F`` over all layers from dense float64 matrices."""
    total = sum(update.weight for update in updates)
    gap = size = 0.0
    for name in result.current.layers:
        ideal = sum(
            (update.weight / total * _dense(update.adapter, name) for update in updates),
            start=torch.zeros((), dtype=torch.float64),
        )
        got = _dense(result.current, name)
        if result.residual is not None:
            got = got + _dense(result.residual, name)
        gap += float((got - ideal).square().sum())
        size += float(ideal.square().sum())
    return float((gap / size) ** 0.5)


def _dense(adapter: Adapter, name: str) -> Tensor:
    factors = adapter.layers[name]
    return adapter.scaling * factors.B.double() @ factors.A.double()


def _random(rank: int, shape: tuple[int, int], generator: torch.Generator) -> LoraFactors:
    d_out, d_in = shape
    return LoraFactors(
        torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    )


def _moved(
    start: LoraFactors, drift: LoraFactors, size: float, trained: frozenset[str]
) -> LoraFactors:
    return LoraFactors(
        start.A + size * drift.A if LORA_A in trained else start.A,
        start.B + size * drift.B if LORA_B in trained else start.B,
    )


def _written(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}"
