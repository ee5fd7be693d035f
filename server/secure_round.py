"""One round whose updates are only seen as one sum: prepare, ask, collect, unmask, step, record."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deal_core.aggregation import LORA_B, NUMERICAL, Aggregate, AggregationRule
from deal_core.lora.state import State
from deal_core.privacy.policy import at_server
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.server_round import ServerRound
from deal_core.training.threads import threads
from deal_core.wire.instruction import LEARN
from deal_core.wire.secure_layout import layout_of
from server.checkpoint import History
from server.gathering import RoundReplies
from server.round import Round
from server.schedule import Step
from server.secure_gathering import SecureGathering
from server.secure_legs import SecureLegs
from server.secure_step import GradientStep, MeanUpdate, SumStep
from server.state_change import finite, reason_of


@dataclass(frozen=True)
class SecureRound:
    """One round of a secure sum.

    Attributes:
        round: what it shares with a round whose updates are seen.
        legs: of the protocol.
    """

    round: Round
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
        clients = one.sample(one.plan.working(step.stage, step.server_round))
        if not clients or not one.phase.should_run(state):
            exchange.event("round_skipped", step)
            return state, history
        rule = one.rule(history)
        trained = one.trained(rule)
        one.log_start(clients)
        layout = layout_of(one.experiment, state.current, trained, self._gradients)
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
        exchange.require_quorum(valid, len(members) - replies.idle, step)
        if piggybacked is not None:
            history = one.evaluation.finish(piggybacked, sent, replies.tally, history)
        state, aggregate = self._summed(sent.state, replies.held, layout, rule)
        received = RoundReplies(sizes=replies.sizes, spent=replies.spent, idle=replies.idle)
        learnt = step.phase == LEARN and LORA_B in trained
        return state, one.record(sent, received, aggregate, learnt, started, history)

    @property
    def _gradients(self) -> bool:
        """Whether gradient sums are added up, and not updates."""
        return at_server(self.round.experiment) and not self.round.phase.public_path

    def _step(self, rule: AggregationRule) -> SumStep:
        """What is made of the sum."""
        if self._gradients:
            return GradientStep(self.round.experiment, len(self.round.plan.tasks))
        return MeanUpdate(rule)

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
        if piggybacked is not None:
            state, history = one.evaluation.run(piggybacked, state, history)
        one.exchange.event("round_skipped", step)
        return state, history

    def _summed(
        self, state: State, held: ServerRound, layout: Layout, rule: AggregationRule
    ) -> tuple[State, Aggregate | None]:
        """The state after the sum, and the aggregate; after a round without one where it fails."""
        one, step = self.round, self.round.step
        try:
            total = self.legs.total(step, held)
            with threads(1):
                after, aggregate = self._step(rule)(state, layout.decode(total), step)
                return finite(after), aggregate
        except (ProtocolError, *NUMERICAL) as fault:
            one.exchange.event("round_lost", step, reason=reason_of(fault))
            return state, None
