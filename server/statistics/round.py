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
from server.round import Round
from server.schedule import Step
from server.state_change import reason_of, sendable
from server.statistics.replies import SumsGathering, SumsReplies, totals, weights


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
        eligible = self.eligible
        clients = self.asked(history)
        if not clients or not one.phase.should_run(state):
            exchange.event("round_skipped", step)
            if piggybacked is None:
                return state, history
            return one.evaluation.run(piggybacked, state, history)
        one.log_start(clients)
        sent = one.ask(state, clients, frozenset(), piggybacked)
        size = embedding_size(one.experiment.model, self.statistics.layers)
        replies = SumsGathering(
            exchange, one.evaluation, step, piggybacked, self.statistics, self.labels, size
        ).run(sent)
        if piggybacked is not None:
            history = one.evaluation.finish(piggybacked, sent, replies.tally, history)
        before = len(eligible) - len(clients)  # have given theirs in an earlier round
        asked = len(eligible) - len(replies.idle)
        exchange.require_quorum(before + len(replies.sizes), asked, step)
        state, history = self._add(one.basis(state, sent), history, replies, clients)
        received = RoundReplies(sizes=replies.sizes)
        return state, one.record(sent, received, None, False, started, history)

    @property
    def eligible(self) -> dict[str, str]:
        """Client to task, of all whose task has labels to sum up by: the answers of others are
        texts."""
        return {name: task for name, task in self.round.eligible.items() if self.labels[task]}

    def asked(self, history: History) -> dict[str, str]:
        """Return whom to ask, and for which task, however few a round samples: sums are of all
        records, or of none that anybody could name. For sums that each gives once, all that have
        not given theirs."""
        if not self.statistics.once:
            return self.eligible
        given = history.collected
        return {n: task for n, task in self.eligible.items() if n not in given.get(task, ())}

    def _add(
        self, state: State, history: History, replies: SumsReplies, clients: Mapping[str, str]
    ) -> tuple[State, History]:
        """The state with the sums of the round; the one before where the numbers fail."""
        one = self.round
        cap = one.experiment.aggregation.weight_cap
        try:
            with threads(1):
                factors = weights(replies.examples, cap, self._earlier(history, clients))
                added = totals(replies, one.exchange.roster.clients, factors)
                state = sendable(self.statistics.absorb(state, added))
        except NUMERICAL as fault:
            one.exchange.event("round_lost", one.step, reason=reason_of(fault))
            return state, history
        for client, factor in factors.items():
            if factor < 1.0:
                own = factor * replies.examples[client]
                one.exchange.event("weight_cut", one.step, client=client, weight=own)
        told = {client: clients[client] for client in (*replies.sizes, *replies.without_data)}
        return state, self.noted(history, told, replies.examples)

    def _earlier(self, history: History, clients: Mapping[str, str]) -> list[float]:
        """Return the records of each of those who gave sums of the round's tasks before."""
        tasks = dict.fromkeys(clients.values())
        return [n for task in tasks for n in history.collected.get(task, {}).values() if n]

    def noted(
        self, history: History, told: Mapping[str, str], examples: Mapping[str, float]
    ) -> History:
        """Return the history with the clients that have given their sums, or have none to give.

        Args:
            history: of the run so far.
            told: client to task.
            examples: client to the number of its records, where that is seen.
        """
        if not self.statistics.once:
            return history
        done: dict[str, dict[str, float]] = {}
        for client, task in told.items():
            done.setdefault(task, {})[client] = examples.get(client, 0.0)
        return history.collecting(done)
