"""One cell of ``deal bench aggregation``: a rule and Flower's FedAvg, in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord

from deal_core.aggregation import AggregationRule, ClientUpdate, make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.arrays import to_arrays
from deal_core.randomness import seeded
from deal_core.wire import codec
from deal_core.wire.adapter_record import EXACT, UpdateReader
from server.wire import as_record
from simulations.bench.fedavg import FedAvgRounds, fedavg_seconds, own_bytes, reply, weight

POOL = 64
"""Different updates; more clients send these again."""
REPEATS = 3
REPEAT_BELOW_SECONDS = 2.5
"""A pass that takes longer is not repeated."""


@dataclass(frozen=True)
class RuleCase:
    """What is measured: a rule, or Flower's memory where ``rule`` names whose arrays it gets."""

    rule: str
    clients: int
    rank: int
    width: int
    layers: int


@dataclass(frozen=True)
class Times:
    """Median seconds of a whole round. ``checked`` and ``decoded`` start from bytes, the other
    two from arrays.

    Attributes:
        rule, checked: the rule alone, and with the server's decoding and checks.
        flower, decoded: FedAvg alone, and with its decoding (it checks nothing).
        passes: how many each is the median of.
    """

    rule: float
    checked: float
    flower: float
    decoded: float
    passes: int


@dataclass(frozen=True)
class Measured:
    """Times, bytes that one client sends, and peak memory above a round of one client (None:
    this system does not tell)."""

    times: Times
    client_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Federation:
    """Where a round starts and what its clients send, as bytes."""

    rule: AggregationRule
    before: Adapter
    pool: Sequence[ArrayRecord]


def measure(cell: RuleCase) -> Measured:
    """Return the times, bytes and memory of one cell; call it in a fresh process.

    Rule, FedAvg, rule, FedAvg, …: what disturbs one disturbs the other.
    """
    torch.set_num_threads(1)
    federation = make_federation(cell)
    run_rule(federation, 1)
    alone = peak_resident()
    first = run_rule(federation, cell.clients)
    peak = above(peak_resident(), alone)
    flower = FedAvgRounds(federation.pool, cell.clients)
    passes = [(*first, *flower.seconds())]
    while len(passes) < REPEATS and first[1] < REPEAT_BELOW_SECONDS:
        passes.append((*run_rule(federation, cell.clients), *flower.seconds()))
    rule, checked, plain, decoded = map(statistics.median, zip(*passes, strict=True))
    client_bytes = sum(len(array.data) for array in federation.pool[0].values())
    return Measured(Times(rule, checked, plain, decoded, len(passes)), client_bytes, peak)


def flower_peak(cell: RuleCase) -> int | None:
    """Peak memory of FedAvg, which holds every reply, above a round of one client."""
    torch.set_num_threads(1)
    pool = make_federation(cell).pool

    def run(clients: int) -> None:
        held = [own_bytes(pool[k % len(pool)]) for k in range(clients)]
        fedavg_seconds([reply(k, record) for k, record in enumerate(held)])

    run(1)
    alone = peak_resident()
    run(cell.clients)
    return above(peak_resident(), alone)


def make_federation(cell: RuleCase) -> Federation:
    """Random updates of ``layers`` square layers, and the rule."""
    generator = seeded("bench", cell.clients, cell.rank, cell.width)
    rule = make_rule(AggregationConfig(rule=cell.rule))
    pool = []
    for _ in range(min(POOL, cell.clients)):
        arrays = to_arrays(_random(cell, generator))
        pool.append(as_record(codec.select(arrays, rule.trained(1))))
    return Federation(rule, _random(cell, generator), pool)


def run_rule(federation: Federation, clients: int) -> tuple[float, float]:
    """One round, update by update as they arrive; seconds of the rule, and with the checks."""
    before, trained = federation.before, federation.rule.trained(1)
    aggregation = federation.rule.begin(before, 1)
    reader = UpdateReader(before, EXACT, trained)
    decoding = adding = 0.0
    for k in range(clients):
        started = time.perf_counter()
        record = federation.pool[k % len(federation.pool)]
        adapter = reader.read(record)
        decoded = time.perf_counter()
        aggregation.add(ClientUpdate(str(k), adapter, weight(k)))
        adding += time.perf_counter() - decoded
        decoding += decoded - started
    started = time.perf_counter()
    aggregation.finish()
    adding += time.perf_counter() - started
    return adding, decoding + adding


def above(together: int | None, alone: int | None) -> int | None:
    """The difference, where there is one."""
    return None if alone is None or together is None else together - alone


def peak_resident(process: int | str = "self") -> int | None:
    """Largest resident memory of a process so far, in bytes, where Linux tells it."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def _random(cell: RuleCase, generator: torch.Generator) -> Adapter:
    size = cell.rank, cell.width
    layers = {
        f"layer{i}": LoraFactors(
            torch.randn(size, generator=generator), torch.randn(size[::-1], generator=generator)
        )
        for i in range(cell.layers)
    }
    return Adapter(layers, 16.0 / cell.rank)
