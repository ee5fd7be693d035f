"""``deal bench scale``: what a round costs as one thing grows, with fitted exponents and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simulations.bench_scale_data import Stream

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One experiment: what grows has the value ``x`` in it (None: it grows within the run)."""

    x: float | None
    stream: Stream
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """One thing that grows.

    Attributes:
        name, unit: in the table and on the plot.
        expected: what the exponent should be, for the reader.
    """

    name: str
    unit: str
    expected: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Point:
    """Seconds of a round (median, smallest, largest), and peak memory of the run."""

    x: float
    seconds: float
    least: float
    most: float
    peak_bytes: int


def axes() -> tuple[Axis, ...]:
    """All that is measured; other things equal within an axis."""
    few = {"federation.clients": 4}
    many = {"federation.clients_per_round": 100}
    two_each = Stream(train=20_000, test=16)
    registered = (100, 316, 1000, 3162, 10_000)
    return (
        Axis(
            "tasks",
            "tasks learnt before",
            "0",
            (Run(None, Stream(tasks=50, labels=3, train=128, test=4), few),),
        ),
        Axis(
            "registered clients",
            "clients registered, 100 in a round",
            "0",
            tuple(
                Run(n, two_each, {**many, "federation.clients": n, "data.max_train": 2 * n})
                for n in registered
            ),
        ),
        Axis(
            "sampled clients",
            "clients in a round, of 1000",
            "1",
            tuple(
                Run(
                    n,
                    two_each,
                    {
                        "federation.clients": 1000,
                        "data.max_train": 2000,
                        "federation.clients_per_round": n,
                    },
                )
                for n in (10, 32, 100, 316, 1000)
            ),
        ),
        Axis(
            "rank",
            "rank of the current adapter (retained: twice that)",
            "0 to 1",
            tuple(
                Run(r, Stream(), {**few, "adapter.rank": r, "adapter.retained_rank": 2 * r})
                for r in (2, 4, 8, 16, 32, 64)
            ),
        ),
        Axis(
            "labels",
            "labels of the task",
            "0 to 1",
            tuple(
                Run(n, Stream(labels=n, train=max(256, n)), {**few, "data.max_train": n})
                for n in (10, 100, 1000, 10_000)
            ),
        ),
        Axis(
            "text length",
            "words of a text",
            "1 to 2",
            tuple(
                Run(n, Stream(words=n), {**few, "train.max_length": 512})
                for n in (10, 20, 40, 80, 160, 320)
            ),
        ),
    )
