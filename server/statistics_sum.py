"""Sums over records in a secure sum, and the heads that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from deal_core.aggregation import NUMERICAL, Aggregate
from deal_core.config.experiment import Experiment
from deal_core.lora.state import State
from deal_core.methods import COUNT, SUM, Statistics, SumContext, Tensors
from deal_core.privacy.distributed_noise import COUNT_WEIGHT, class_sum_noise, grid_step
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.terms import LEAST_SITES
from deal_core.wire.secure_layout import CLASS_SUMS, statistics_layout
from server import wire
from server.exchange import Exchange, answered
from server.plan import Step
from server.round import Round
from server.round_sum import Sums

ContextOf = Callable[[Sequence[str], float], SumContext]
"""Tasks, and the deviation of the noise, to what the server knows of their sums."""


@dataclass(frozen=True)
class StatisticsSum:
    """Attributes: the ``round``; what is added up, ``statistics``; ``tasks``, each to the clients
    that have worked on it; ``labels``, task to their number; ``context``, what is known of sums."""

    round: Round
    statistics: Statistics
    tasks: Mapping[str, Sequence[str]]
    labels: Mapping[str, int]
    context: ContextOf

    @property
    def trained(self) -> frozenset[str]:
        """Nothing is trained."""
        return frozenset()

    def clients(self) -> dict[str, str]:
        """Return all that have worked on a task of the round, however few a round samples: sums are
        of all records, or of none that anybody could name."""
        asked: dict[str, str] = {}
        for name in self.round.exchange.roster.clients:
            own = [task for task, clients in self.tasks.items() if name in clients]
            if own:
                asked[name] = own[0]
        return asked

    def layout(self, state: State, basis: str) -> Layout:
        """Return that of the sums of all tasks of the round."""
        model = self._config.model
        shapes = [self.statistics.shapes(self.labels[task], model) for task in self.tasks]
        return statistics_layout(self._config, shapes, basis)

    def add(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state with the sums of each task that three clients or more have given.

        Args:
            state: before the round.
            sums: over the clients.
            members: how many were to give theirs, and shared the noise.
            given: those whose sums have arrived.
        """
        deviation, totals = self._deviation(members), dict[str, Tensors]()
        for place, (task, clients) in enumerate(self.tasks.items()):
            if len(set(clients) & set(given)) < LEAST_SITES:
                self.round.exchange.event("sums_left_out", self.round.step, task=task)
            elif self.statistics.exact is None:
                totals[task] = self._class_sums(sums[f"{place}.{CLASS_SUMS}"])
            else:
                totals[task] = self._exact(sums, f"{place}.")
        if not totals:
            return state, None
        context = self.context([] if self.statistics.exact else list(totals), deviation)
        return self.statistics.absorb(state, totals, context), None

    def _exact(self, sums: Sums, place: str) -> Tensors:
        own = {
            name.removeprefix(place): torch.from_numpy(part)
            for name, part in sums.items()
            if name.startswith(place)
        }
        assert self.statistics.exact is not None
        self.statistics.exact.check(own)
        return own

    def _class_sums(self, numbers: NDArray[Any]) -> Tensors:
        """Counts and sums, in units of vectors, of whole numbers on the grid."""
        grid = grid_step(self._config.privacy.max_grad_norm)
        values = grid * torch.from_numpy(numbers).double()
        return {COUNT: values[:, -1] / COUNT_WEIGHT, SUM: values[:, :-1]}

    def _deviation(self, members: int) -> float:
        """Standard deviation of the noise of all sites, in each entry."""
        if self.statistics.exact is not None:
            return 0.0
        config, tasks = self._config, len(self.round.plan.tasks)
        multiplier, shares = class_sum_noise(config, self.statistics, members, tasks)
        return multiplier * config.privacy.max_grad_norm * math.sqrt(members / shares)

    @property
    def _config(self) -> Experiment:
        return self.round.experiment


def found_worse(exchange: Exchange, step: Step, state: State, tasks: Sequence[str]) -> bool:
    """Return whether most clients that answer say that their own records are answered better
    without the heads of ``state``; ``tasks``: whose class means are new in it."""
    common = exchange.instruction(step, state)
    asked = common.model_copy(update={"tasks": tuple(tasks), "server_round": 0})
    sent = exchange.ask(state, asked, dict.fromkeys(exchange.roster.clients, asked))
    worse: dict[str, bool] = {}
    for reply in exchange.replies(step, sent):
        try:
            worse[reply.client] = wire.read_verdict(answered(reply))
        except wire.ClientSkipped:
            continue
        except NUMERICAL as fault:
            exchange.event("client_failed", step, client=reply.client, reason=str(fault)[:400])
    against = sum(worse.values())
    if against:
        exchange.event("class_means_doubted", step, tasks=list(tasks), by=against, of=len(worse))
    return 2 * against > len(worse)
