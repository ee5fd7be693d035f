"""One round whose updates are only seen as one sum: prepare, ask, collect, unmask, step, record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from deal_core.aggregation import LORA_B, Aggregate
from deal_core.lora.state import State
from deal_core.privacy.accounting.sum_terms import sum_terms
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.server_round import ServerRound
from deal_core.training.threads import threads
from deal_core.wire.instruction import LEARN
from deal_core.wire.summed_loss import mean_loss, without_loss
from server.checkpoint import History
from server.gathering import RoundReplies
from server.lost_sum import may_be_lost
from server.round import Round
from server.round_sum import RoundSum
from server.schedule import Step
from server.secure.gathering import SecureGathering
from server.secure.legs import SecureLegs
from server.state_change import reason_of, sendable


@dataclass(frozen=True)
class SecureRound:
    """One round of a secure sum.

    Attributes:
        round: what it shares with a round whose updates are seen.
        sum: what is added up, and what becomes of it.
        legs: of the protocol.
    """

    round: Round
    sum: RoundSum
    legs: SecureLegs

    def run(
        self, state: State, history: History, piggybacked: Step | None
    ) -> tuple[State, History]:
        """Play the round. A sum that does not come about costs the round, and never the run.

        Args:
            state: what the round begins from.
            history: of the run so far.
            piggybacked: the step whose evaluation goes along with the requests; None: none.

        Returns:
            The state and the history after it.

        Raises:
            UserError: too few valid replies.
        """
        started, one, step = time.monotonic(), self.round, self.round.step
        exchange = one.exchange
        clients = self.sum.clients()
        if not clients:
            exchange.event("round_skipped", step)
            if piggybacked is None:
                return state, history
            return one.evaluation.run(piggybacked, state, history)
        trained = self.sum.trained
        one.log_start(clients)
        layout = self.sum.layout(state, self._basis(state, clients, piggybacked))
        try:
            held = self.legs.open(step, clients, layout)
        except ProtocolError as fault:
            return self._not_begun(fault, state, history, piggybacked)
        requests = self.legs.mask_requests(held)
        members = {name: task for name, task in clients.items() if name in requests}
        sent = one.ask(state, members, trained, piggybacked).carrying(requests)
        gathering = SecureGathering(exchange, one.evaluation, self.legs, step, piggybacked)
        replies = gathering.run(sent, held)
        valid = max(len(replies.sizes), len(replies.held.masked))
        if one.phase.statistics is None:
            exchange.require_willing(one.plan.learners, step)
        exchange.require_quorum(valid + replies.hindered, len(members) - replies.idle, step)
        if piggybacked is not None:
            history = one.evaluation.finish(piggybacked, sent, replies.tally, history)
        state, aggregate = self._summed(one.basis(state, sent), replies.held, layout)
        received = RoundReplies(sizes=replies.sizes, spent=replies.spent)
        learnt = step.phase == LEARN and LORA_B in trained
        return state, one.record(sent, received, aggregate, learnt, started, history)

    def _basis(self, state: State, clients: Mapping[str, str], piggybacked: Step | None) -> str:
        """What all clients are told alike."""
        shown = self.round.shown(state, piggybacked)
        instructions = self.round.instructions(shown, clients, self.sum.trained)
        one = next(iter(instructions.values()))
        config = self.round.experiment
        return sum_terms(config, config.model.name, one, shown)

    def _not_begun(
        self,
        fault: ProtocolError,
        state: State,
        history: History,
        piggybacked: Step | None,
    ) -> tuple[State, History]:
        """The state and the history after a round in which nobody was asked to train."""
        one, step = self.round, self.round.step
        one.exchange.event("round_lost", step, reason=reason_of(fault))
        if one.phase.statistics is None:
            one.exchange.require_willing(one.plan.learners, step)
        if piggybacked is not None:
            state, history = one.evaluation.run(piggybacked, state, history)
        one.exchange.event("round_skipped", step)
        return state, history

    def _summed(
        self, state: State, held: ServerRound, layout: Layout
    ) -> tuple[State, Aggregate | None]:
        """Return the state after the sum, and the aggregate; where it fails the state before.

        Raises:
            UserError: two sites are one.
        """
        exchange, step = self.round.exchange, self.round.step
        found = None
        with may_be_lost(exchange, "round_lost", step):
            sums = layout.decode(self.legs.total(step, held), len(held.masked))
            members, given = len(held.members or ()), self.legs.given(held)
            with threads(1):
                after, aggregate = self.sum.add(state, without_loss(sums), members, given)
                found = sendable(after), aggregate, mean_loss(sums)
        if found is None:
            return state, None
        after, aggregate, loss = found
        if loss is not None:
            exchange.event("loss_summed", step, loss=loss)
        return after, aggregate
