"""One round whose updates are only seen as one sum: prepare, ask, collect, unmask, step, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from deal_core.aggregation import (
    NUMERICAL,
    Aggregate,
    AggregationRule,
    ClientUpdate,
    finished,
)
from deal_core.config.experiment import Experiment
from deal_core.lora.attach import changed
from deal_core.lora.state import State
from deal_core.privacy.distributed_noise import grid_step, sum_deviation
from deal_core.protection import sum_terms
from deal_core.secure_sum.layout import Layout, weighted_means
from deal_core.secure_sum.messages import ProtocolError
from deal_core.secure_sum.server_round import ServerRound
from deal_core.training.hardware import threads
from deal_core.wire.secure_layout import EXAMPLES, mean_loss, without_loss
from server import wire
from server.checkpoint import History
from server.dispatch import Dispatch
from server.evaluation import Evaluation, EvaluationReplies
from server.exchange import Exchange, answered
from server.gathering import RoundReplies, refuse
from server.lost_sum import may_be_lost
from server.plan import Step
from server.reply_collection import Reply
from server.results import Spending
from server.round import Round, fold_residual, reason_of, sendable
from server.round_sum import RoundSum, Sums
from server.secure.protocol import SecureLegs


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
        return state, one.record(sent, received, aggregate, started, history)

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


@dataclass(frozen=True)
class MaskedReplies:
    """What the replies of a round have brought.

    Attributes:
        held: the secure sum with their masked vectors.
        sizes: bytes of each valid reply.
        spent: what privacy has cost, by client that says so.
        idle: how many clients took no part.
        hindered: how many could not, by what another site sent.
        tally: of the evaluation that the requests carried along.
    """

    held: ServerRound
    sizes: dict[str, int] = field(default_factory=dict)
    spent: dict[str, Spending] = field(default_factory=dict)
    idle: int = 0
    hindered: int = 0
    tally: EvaluationReplies = field(default_factory=EvaluationReplies)


@dataclass(frozen=True)
class SecureGathering:
    """Takes the masked vector of every reply that may count. A bad one costs its sender the round.

    Attributes:
        piggybacked_evaluation: the step whose evaluation the requests carry; None: none.
    """

    exchange: Exchange
    evaluation: Evaluation
    legs: SecureLegs
    step: Step
    piggybacked_evaluation: Step | None

    def run(self, sent: Dispatch, held: ServerRound) -> MaskedReplies:
        """Take the replies as they come."""
        gathered = MaskedReplies(held)
        for reply in self.exchange.replies(self.step, sent):
            if self.piggybacked_evaluation is not None:
                self.evaluation.hear(self.piggybacked_evaluation, reply, sent, gathered.tally)
            if sent.instructions[reply.client].task:
                gathered = self._heard(reply, sent, gathered)
        return gathered

    def _heard(self, reply: Reply, sent: Dispatch, gathered: MaskedReplies) -> MaskedReplies:
        client, instruction = reply.client, sent.instructions[reply.client]
        spent: Spending | None = None
        try:
            message = answered(reply)
            figures, spent = wire.read_figures(message, instruction)
            if spent is not None:  # it is charged there, whatever is found wrong here
                gathered.spent[client] = spent
            held = self.legs.add(gathered.held, client, message)
        except wire.ClientSkipped as reason:
            self.legs.sits_out(self.step, client, instruction.task, reason)
            self.exchange.heard_willing(client, reason.code != wire.BY_POLICY)
            return replace(gathered, idle=gathered.idle + 1)
        except NUMERICAL as fault:
            refuse(self.exchange, self.step, client, fault, spent)
            held, task = gathered.held, instruction.task
            hindered = self.legs.note_blame(self.step, held, client, reply.message, task)
            return replace(gathered, hindered=gathered.hindered + hindered)
        self.exchange.heard_willing(client, True)
        gathered.sizes[client] = wire.secure_bytes(message.content)
        self.exchange.event(
            "client_finished", self.step, client=client, task=instruction.task, **figures
        )
        return replace(gathered, held=held)


SumStep = Callable[[State, Sums, Step], tuple[State, Aggregate | None]]
"""From the state before a round, its sums and its place, to the state after it and what was
aggregated."""


NOISE_PER_EXAMPLE = 1.8e-2
"""Of a step at the server: noise of the mean gradient, in clipping bounds, times the learning rate,
at most; where there is more noise the rate is lowered."""


@dataclass(frozen=True)
class GradientStep:
    """A step of gradient descent on a sum of clipped gradients and noise.

    Attributes:
        tasks: number of them in the run.
    """

    experiment: Experiment
    tasks: int

    def __call__(self, state: State, sums: Sums, step: Step) -> tuple[State, Aggregate | None]:
        """Return the state after the step: (M59)."""
        examples = max(1, int(sums[EXAMPLES][0]))
        unit = grid_step(self.experiment.privacy.max_grad_norm) * self._rate(examples) / examples
        change = {
            key: torch.from_numpy(-unit * part) for key, part in sums.items() if key != EXAMPLES
        }
        return replace(state, current=changed(state.current, change)), None

    def _rate(self, examples: int) -> float:
        """The learning rate, lowered where a step has much noise."""
        config = self.experiment
        rate = config.train.learning_rate
        if config.privacy.mechanism == "none":
            return rate
        return min(rate, NOISE_PER_EXAMPLE * examples / sum_deviation(config, self.tasks))


@dataclass(frozen=True)
class MeanUpdate:
    """The rule's aggregate of the weighted mean of all updates, as if it were one client's."""

    rule: AggregationRule

    def __call__(self, state: State, sums: Sums, step: Step) -> tuple[State, Aggregate | None]:
        """Return the state after the round."""
        means = {key: torch.from_numpy(part) for key, part in weighted_means(sums).items()}
        after = changed(state.current, means)
        trained = self.rule.trained(step.server_round)
        aggregation = self.rule.begin(state.current, step.server_round)
        aggregation.add(ClientUpdate("all", after, 1.0))
        aggregate = finished(aggregation)
        if len(trained) > 1:  # what the mean of each factor loses shows in single updates alone
            aggregate = replace(aggregate, error=None)
        return fold_residual(state, aggregate), aggregate
