"""Embedded tasks, divided over clients, and rounds of sums over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.experiment import Experiment
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.methods import EmbeddedTask, Statistics, method_of
from deal_core.randomness import seeded

SIZE, LABELS = 12, 4
Data = tuple[Tensor, Tensor]


def data(seed: int, examples: int = 160) -> Data:
    """Unit vectors around a mean of each label, with noise that has a direction."""
    generator = seeded("statistics", seed)
    means = torch.randn(LABELS, SIZE, generator=generator)
    targets = torch.randint(LABELS, (examples,), generator=generator)
    stretch = torch.linspace(0.2, 2.0, SIZE)
    x = means[targets] + stretch * torch.randn(examples, SIZE, generator=generator)
    return normalize(x, dim=1), targets


def divided(x: Tensor, y: Tensor, how: str) -> list[Data]:
    """The same records at other clients."""
    if how == "one client":
        places = torch.zeros(len(x), dtype=torch.long)
    elif how == "a label each":
        places = y
    elif how == "one record and the rest":
        places = (torch.arange(len(x)) > 0).long()
    else:
        places = torch.randint(5, (len(x),), generator=seeded("divided"))
    return [(x[places == k], y[places == k]) for k in places.unique()]


SPLITS = ("one client", "a label each", "one record and the rest", "at random")


def embedded(x: Tensor, y: Tensor, head: Tensor | None = None) -> EmbeddedTask:
    return EmbeddedTask(x, y, LABELS, head)


def method_with(**keys: object):
    return method_of(Experiment(method=MethodConfig.model_validate(keys)))


def statistics_in(method, name: str) -> Statistics:
    return {phase.name: phase.statistics for phase in method.phases}[name]


def one_round(state: State, statistics: Statistics, tasks: dict[str, list[Data]]) -> State:
    """A round in which every client gives its sums, checked, in float64."""
    totals = {}
    for task, clients in tasks.items():
        for x, y in clients:
            sums = statistics.collect(embedded(x, y, state.heads.get(task)))
            expected = statistics.shapes(LABELS, SIZE)
            assert {name: tuple(value.shape) for name, value in sums.items()} == dict(expected)
            statistics.check(sums)
            total = totals.setdefault(task, {})
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value
    return statistics.absorb(state, totals)


def start() -> State:
    shapes = {"layer": (SIZE, SIZE)}
    return State(zero_adapter(shapes, 2, 1.0), zero_adapter(shapes, 2))
