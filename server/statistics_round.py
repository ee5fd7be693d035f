"""One round of sums: ask those that have not given theirs, collect, check, add, record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from deal_core.aggregation import NUMERICAL
from deal_core.lora.state import State
from deal_core.methods import Statistics
from deal_core.models import embedding_size
from deal_core.training.threads import threads
from server.checkpoint import History
from server.gathering import RoundReplies
from server.plan import Order
from server.round import Round
from server.schedule import Step
from server.state_change import finite, reason_of
from server.statistics import SumsGathering, SumsReplies, totals


@dataclass(frozen=True)
class StatisticsRound:
    """One round in which clients train nothing.

    Attributes:
        round: what it shares with a round of training: whom and how it asks, what it records.
        statistics: what clients sum up, and what becomes of it.
        labels: task to the number of its labels.
    """

    round: Round
    statistics: Statistics
    labels: Mapping[str, int]

    def run(
        self, state: State, history: History, piggybacked: Step | None
    ) -> tuple[State, History]:
        """Play the round.

        Args:
            state: what the round begins from.
            history: of the run so far.
            piggybacked: the step whose evaluation goes along with the requests; None: none.

        Returns:
            The state and the history after it.

        Raises:
            UserError: too few valid replies.
        """
        started, one = time.monotonic(), self.round
        exchange, step = one.exchange, one.step
        due = self.due(history)
        clients = {name: tasks[0] for name, tasks in due.items()}
        if not clients or not one.phase.should_run(state):
            exchange.event("round_skipped", step)
            if piggybacked is None:
                return state, history
            return one.evaluation.run(piggybacked, state, history)
        one.log_start(clients)
        several = {name: tasks for name, tasks in due.items() if len(tasks) > 1}
        sent = one.ask(state, clients, frozenset(), piggybacked, several)
        size = embedding_size(one.experiment.model, self.statistics.layers)
        replies = SumsGathering(
            exchange, one.evaluation, step, piggybacked, self.statistics, self.labels, size
        ).run(sent)
        if piggybacked is not None:
            history = one.evaluation.finish(piggybacked, sent, replies.tally, history)
        exchange.require_quorum(len(replies.sizes), len(clients) - len(replies.declined), step)
        state, history = self._add(one.basis(state, sent), history, replies, due)
        received = RoundReplies(sizes=replies.sizes)
        return state, one.record(sent, received, None, False, started, history)

    def due(self, history: History) -> dict[str, Order]:
        """Return client to the tasks whose sums it is asked for. Those that each gives once, and
        that were lost on their way, are asked again when the next ones are due."""
        one = self.round
        if not self.statistics.once or one.plan.joint_tasks:
            return {name: (task,) for name, task in self.asked(one.eligible, history).items()}
        given = history.collected
        worked = one.plan.worked(one.step.stage, one.step.server_round)
        due = {
            name: tuple(task for task in tasks if name not in given.get(task, ()))
            for name, tasks in worked.items()
        }
        return {name: tasks for name, tasks in due.items() if tasks}

    def asked(self, eligible: Mapping[str, str], history: History) -> dict[str, str]:
        """Return whom to ask, and for which task, however few a round samples: sums are of all
        records, or of none that anybody could name. For sums that each gives once, all that have
        not given theirs."""
        if not self.statistics.once:
            return dict(eligible)
        given = history.collected
        return {name: task for name, task in eligible.items() if name not in given.get(task, ())}

    def _add(
        self, state: State, history: History, replies: SumsReplies, due: Mapping[str, Order]
    ) -> tuple[State, History]:
        """The state with the sums of the round; the one before where the numbers fail."""
        one = self.round
        cap = one.experiment.aggregation.weight_cap
        try:
            with threads(1):
                added = totals(replies, one.exchange.roster.clients, cap)
                state = finite(self.statistics.absorb(state, added))
        except NUMERICAL as fault:
            one.exchange.event("round_lost", one.step, reason=reason_of(fault))
            return state, history
        told = (*replies.sizes, *replies.declined)
        return state, self.noted(history, {client: due[client] for client in told})

    def noted(self, history: History, told: Mapping[str, Order]) -> History:
        """Return the history with the clients that have given their sums, or have none to give;
        client to tasks."""
        if not self.statistics.once:
            return history
        done: dict[str, list[str]] = {}
        for client, tasks in told.items():
            for task in tasks:
                done.setdefault(task, []).append(client)
        return history.collecting(done)
