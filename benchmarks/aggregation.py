"""Seconds and exactness of every aggregation rule, from bytes and with all checks, beside Flower's
FedAvg on the same bytes, which checks nothing. One thread, rule and FedAvg in turn."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from deal_core.aggregation.rule import Aggregate, ClientUpdate, finished
from deal_core.aggregation.rules import AGGREGATION_RULES, make_rule
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.randomness import seeded
from deal_core.training.hardware import threads
from deal_core.wire.tensors import EXACT, selected, unpack
from measuring import Figures, Row, measured
from server.wire import as_record

LINEAR = ("fedit", "ffa")
"""Rules in constant memory; the others hold what is sent, and have 100 clients at most."""
POOL, LAYERS = 64, 12
"""Different updates, which more clients send again, and layers of each."""
SIZES = {
    "small": ((3, 2, 16),),
    "usual": ((30, 8, 384),),
    "full": tuple((n, r, width) for n in (10, 100, 1000) for r in (8, 16) for width in (384, 768)),
}
"""Clients, rank and width of each table."""


def random_adapter(rank: int, width: int, generator: torch.Generator) -> Adapter:
    """Return an adapter of square layers."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    layers = [LoraFactors(draw(rank, width), draw(width, rank)) for _ in range(LAYERS)]
    return Adapter({f"layer{n}": each for n, each in enumerate(layers)}, 16.0 / rank)


def compare(name: str, clients: int, rank: int, width: int) -> Row:
    """Return the figures of a rule; ``error`` is that of three of the clients."""
    rule, generator = make_rule(AggregationConfig(rule=name)), seeded("bench", rank, width)
    before, *sent = (random_adapter(rank, width, generator) for _ in range(1 + min(POOL, clients)))
    pool = [as_record(selected(adapter, rule.trained)) for adapter in sent]

    def updates(count: int) -> Iterator[ClientUpdate]:
        for k in range(count):
            adapter = unpack(pool[k % len(pool)], EXACT, before, rule.trained)
            yield ClientUpdate(str(k), adapter, 100.0 + k % 7)

    def aggregated(count: int) -> Aggregate:
        aggregation = rule.begin(before)
        for update in updates(count):
            aggregation.add(update)
        return finished(aggregation)

    weights = [MetricRecord({"num_examples": 100.0 + k % 7}) for k in range(clients)]
    replies = [
        RecordDict({"lora": pool[k % len(pool)], "weights": each}) for k, each in enumerate(weights)
    ]
    pairs = [
        (
            measured(lambda: aggregated(clients))["seconds"],
            measured(lambda: aggregate_arrayrecords(replies, "num_examples"))["seconds"],
        )
        for _ in range(3)
    ]
    return {
        "rule": name,
        "MB sent": sum(len(array.data) for array in pool[0].values()) / 1e6,
        "s": median(own for own, _ in pairs),
        "FedAvg, s": median(other for _, other in pairs),
        "ratio": median(own / other for own, other in pairs),
        "error": dense_error(aggregated(3), list(updates(3))),
    }


def dense_error(result: Aggregate, updates: Sequence[ClientUpdate]) -> float:
    """Return the relative error against the mean of the products, dense and in float64."""

    def dense(adapter: Adapter, name: str) -> Tensor:
        factors = adapter.layers[name]
        return adapter.scaling * factors.B.double() @ factors.A.double()

    total = sum(update.weight for update in updates)
    gap = size = 0.0
    for name in result.current.layers:
        got = dense(result.current, name)
        if result.residual is not None:
            got += dense(result.residual, name)
        parts = (update.weight / total * dense(update.adapter, name) for update in updates)
        ideal: Any = sum(parts)
        gap += float((got - ideal).square().sum())
        size += float(ideal.square().sum())
    return float((gap / size) ** 0.5)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and show size by size."""
    figures = Figures("aggregation", __doc__, given)
    for size in SIZES[figures.size]:
        rules = AGGREGATION_RULES if size[0] <= 100 else LINEAR
        with threads(1):
            rows = [compare(name, *size) for name in rules]
        figures.add("{} clients, rank {}, width {}".format(*size), rows)


if __name__ == "__main__":
    main()
