"""One round whose updates are only seen as one sum: prepare, ask, collect, unmask, step, record."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deal_core.aggregation import LORA_B, NUMERICAL, Aggregate
from deal_core.lora.state import State
from deal_core.privacy.accounting.plan import at_server
from deal_core.privacy.mechanisms.registry import make_mechanism
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
from server.secure_gathering import MaskedReplies, SecureGathering
from server.secure_legs import SecureLegs
from server.secure_step import GradientStep, MeanUpdate, Take
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
        trained = make_mechanism(one.experiment).trained(rule.trained(step.server_round))
        tasks = sorted(set(clients.values()), key=one.plan.tasks.index)
        exchange.event("round_started", step, clients=len(clients), tasks=tasks)
        gradients = at_server(one.experiment)
        layout = layout_of(one.experiment, state.current, trained, gradients)
        try:
            held = self.legs.open(step, clients, layout)
        except ProtocolError as fault:
            exchange.event("round_lost", step, reason=reason_of(fault))
            if piggybacked is not None:
                return one.evaluation.run(piggybacked, state, history)
            return state, history
        sent = one.ask(state, clients, trained, piggybacked).carrying(self.legs.mask_requests(held))
        replies = MaskedReplies(held)
        if held.survivors is None:
            gathering = SecureGathering(exchange, one.evaluation, self.legs, step, piggybacked)
            replies = gathering.run(sent, held)
            exchange.require_quorum(len(replies.sizes), len(clients) - replies.idle, step)
        if piggybacked is not None:
            history = one.evaluation.finish(piggybacked, sent, replies.tally, history)
        take = GradientStep(one.experiment, len(one.plan.tasks)) if gradients else MeanUpdate(rule)
        state, aggregate = self._step(sent.state, replies.held, layout, take)
        received = RoundReplies(sizes=replies.sizes, spent=replies.spent, idle=replies.idle)
        learnt = step.phase == LEARN and LORA_B in trained
        return state, one.record(sent, received, aggregate, learnt, started, history)

    def _step(
        self, state: State, held: ServerRound, layout: Layout, take: Take
    ) -> tuple[State, Aggregate | None]:
        """The state after the sum; the one before where there is none, or its numbers fail."""
        try:
            total = self.legs.total(self.round.step, held)
            with threads(1):
                after, aggregate = take(state, layout.decode(total), self.round.step)
                return finite(after), aggregate
        except (ProtocolError, *NUMERICAL) as fault:
            self.round.exchange.event("round_lost", self.round.step, reason=reason_of(fault))
            return state, None
