"""What ``deal bench scale`` lets grow, one thing at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simulations.bench.scale_data import Stream


@dataclass(frozen=True)
class Run:
    """One experiment: what grows has the value ``x`` in it (None: it grows within the run)."""

    x: float | None
    stream: Stream
    settings: Mapping[str, Any] = field(default_factory=dict)


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


FEW = {"federation.clients": 4}
TWO_EACH = Stream(train=20_000, test=16)
"""Two examples for each of 10,000 clients: rounds are short, so the engine shows."""


def axes() -> tuple[Axis, ...]:
    """All that is measured; other things equal within an axis."""
    return (
        Axis("tasks", "tasks learnt before", "0", (tasks(),)),
        Axis(
            "registered clients",
            "clients registered, 100 of them in a round",
            "0",
            tuple(federation(n, 100, n) for n in (100, 1000, 10_000)),
        ),
        Axis(
            "sampled clients",
            "clients in a round, of 1000 registered",
            "1",
            tuple(federation(1000, n, n) for n in (10, 32, 100, 316)),
        ),
        Axis(
            "rank",
            "rank of the current adapter (retained: twice that)",
            "0 to 1",
            tuple(few(r, Stream(), rank=r, retained_rank=2 * r) for r in (4, 16, 64)),
        ),
        Axis(
            "labels",
            "labels of the task",
            "0 to 1",
            tuple(labels(n) for n in (10, 100, 1000, 10_000)),
        ),
        Axis(
            "text length",
            "words of a text",
            "1 to 2",
            tuple(few(n, Stream(words=n)) for n in (10, 40, 160)),
        ),
    )


def quick_axes() -> tuple[Axis, ...]:
    """One point of a growing federation, and three tasks."""
    small = Stream(train=24, test=4)
    settings = {"federation.clients": 3, "federation.clients_per_round": 2}
    return (
        Axis("tasks", "tasks learnt before", "0", (tasks(3),)),
        Axis("sampled clients", "clients in a round", "1", (Run(2, small, settings),)),
    )


def tasks(count: int = 50) -> Run:
    """One stream; the seconds of each task's rounds are the points."""
    two = {"federation.clients": 2}
    return Run(None, Stream(tasks=count, labels=3, train=64, test=2), two)


def federation(registered: int, sampled: int, x: float) -> Run:
    """Two examples for every registered client."""
    settings = {
        "federation.clients": registered,
        "federation.clients_per_round": sampled,
        "data.max_train": 2 * registered,
    }
    return Run(x, TWO_EACH, settings)


def few(x: float, stream: Stream, **adapter: int) -> Run:
    """Four clients share 256 texts."""
    own = {f"adapter.{key}": value for key, value in adapter.items()}
    return Run(x, stream, {**FEW, "train.max_length": 512, **own})


def labels(count: int) -> Run:
    """The label space grows, the examples do not: 256 of the many are trained on."""
    return Run(count, Stream(labels=count, train=max(256, count)), {**FEW, "data.max_train": 256})
