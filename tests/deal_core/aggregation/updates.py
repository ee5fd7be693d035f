"""Small adapters, and what honest and misbehaving clients make of them."""

import torch

from deal_core.aggregation.rule import LORA_A, LORA_B, ClientUpdate
from deal_core.aggregation.rules import make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors

SHAPES = {"q": (10, 12), "v": (9, 9)}


def adapter(generator, rank=3, scaling=2.0, size=1.0, shapes=SHAPES):
    layers = {
        name: LoraFactors(
            size * torch.randn(rank, d_in, generator=generator),
            size * torch.randn(d_out, rank, generator=generator),
        )
        for name, (d_out, d_in) in shapes.items()
    }
    return Adapter(layers, scaling)


def moved_by(before, trained, *steps):
    """The adapter after steps, each a factor and a direction."""
    layers = {}
    for name, start in before.layers.items():
        own = [(size, step.layers[name]) for size, step in steps]
        layers[name] = LoraFactors(
            start.A + sum(size * f.A for size, f in own) if LORA_A in trained else start.A,
            start.B + sum(size * f.B for size, f in own) if LORA_B in trained else start.B,
        )
    return Adapter(layers, before.scaling)


def replies(before, trained, generator, count, size=0.1):
    """Clients that agree on a direction and differ by noise."""
    common = adapter(generator)
    noises = [adapter(generator, size=size) for _ in range(count)]
    moved = [moved_by(before, trained, (1.0, common), (1.0, noise)) for noise in noises]
    return [ClientUpdate(f"c{k}", each, 1.0 + k) for k, each in enumerate(moved)]


def skewed(before, trained, generator, count=10, size=0.4):
    """Honest clients of two kinds, whose changes are opposed, each with noise of its own."""
    common, updates = adapter(generator), []
    for k in range(count):
        lean, noise = size * (-1) ** k, adapter(generator, size=size / 2)
        moved = moved_by(before, trained, (lean, common), (1.0, noise))
        updates.append(ClientUpdate(f"c{k}", moved, 1.0 + k))
    return updates


def spoiled(update, kind):
    sign = {"flipped": -4.0, "scaled": 50.0}[kind]
    layers = {n: LoraFactors(f.A, sign * f.B) for n, f in update.adapter.layers.items()}
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


def turned(update, trained):
    """What :mod:`simulations.engines.inprocess` does to an update: the product changes its sign."""
    layers = {
        n: LoraFactors(f.A, -f.B) if LORA_B in trained else LoraFactors(-f.A, f.B)
        for n, f in update.adapter.layers.items()
    }
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


def zeroed(before):
    layers = {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in before.layers.items()}
    return Adapter(layers, before.scaling)


def moved_to(update, before, share):
    """The update, ``share`` of the way from the start."""
    layers = {
        n: LoraFactors(s.A + share * (f.A - s.A), s.B + share * (f.B - s.B))
        for (n, f), s in zip(update.adapter.layers.items(), before.layers.values(), strict=True)
    }
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


def dense(given, name):
    factors = given.layers[name]
    return given.scaling * factors.B.double() @ factors.A.double()


def delta_of(given):
    return torch.cat([dense(given, name).flatten() for name in SHAPES])


def delta(result):
    parts = [result.current] + ([result.residual] if result.residual else [])
    return torch.cat([sum(dense(part, name) for part in parts).flatten() for name in SHAPES])


def run(updates, before, **options):
    aggregation = make_rule(AggregationConfig(**options)).begin(before)
    for update in updates:
        aggregation.add(update)
    return aggregation.finish()
