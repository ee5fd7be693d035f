"""A round: clients are asked, updates become one adapter, and all clients take the next state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from deal_core.aggregation import (
    NUMERICAL,
    Aggregate,
    Aggregation,
    AggregationFailed,
    AggregationRule,
    finished,
    make_rule,
    one_line,
    require_finite,
)
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.adapter import compress, stack, zero_adapter
from deal_core.lora.kinds import kind_of
from deal_core.lora.state import State
from deal_core.methods import Phase
from deal_core.protection import make_mechanism
from deal_core.randomness import seeded
from deal_core.training.hardware import threads
from deal_core.wire.adapter_record import require_bounded
from deal_core.wire.instruction import LEARN, Instruction
from server.checkpoint import History
from server.dispatch import Dispatch, carrying, training_requests
from server.evaluation import Evaluation
from server.exchange import Exchange
from server.gathering import Gathering, RoundReplies, limits_of
from server.plan import Plan, Step


def fold_residual(state: State, aggregate: Aggregate) -> State:
    """Return the state after a round: what the current adapter cannot hold joins the residual,
    whose rank stays below the layers' own."""
    gained = [part for part in (state.residual, aggregate.residual) if part is not None]
    if not gained:
        return replace(state, current=aggregate.current)
    residual = stack(gained)
    full = max(min(shape) for shape in residual.shapes.values())
    if residual.rank > full:
        residual = compress(residual, full)
    return replace(state, current=aggregate.current, residual=residual)


def sendable(state: State) -> State:
    """Return the state itself: no client would refuse it.

    Raises:
        AggregationFailed: some number of it is not finite, or too large for a model.
    """
    require_finite("the current adapter", state.current)
    require_finite("the retained adapter", state.retained)
    require_finite("the residual", state.residual)
    for name, part in (("a head", state.heads), ("a sum", state.sums)):
        if any(not bool(value.isfinite().all()) for value in part.values()):
            raise AggregationFailed(f"{name} is not finite")
    for adapter in (state.current, state.retained, state.residual):
        if adapter is not None:
            require_bounded(adapter)
    return state


def reason_of(fault: Exception) -> str:
    """Return what failed, for the log."""
    told = isinstance(fault, (AggregationFailed, UserError))  # a line for people already
    return str(fault) if told else one_line(fault)


@dataclass(frozen=True)
class Round:
    """One round of a run.

    Attributes:
        exchange: with the clients.
        evaluation: on all tasks, which requests may carry along.
        plan: who works on what.
        phase: of the method, to which the round belongs.
        step: which round it is.
        tasks: of several that are worked on at once; else none.
    """

    exchange: Exchange
    evaluation: Evaluation
    plan: Plan
    phase: Phase
    step: Step
    tasks: tuple[str, ...] = ()

    @property
    def experiment(self) -> Experiment:
        """Of the run."""
        return self.exchange.experiment

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
        started, step = time.monotonic(), self.step
        eligible = self.eligible
        if not eligible:
            self.exchange.event("round_skipped", step)
            return state, history
        rule, clients = self.rule(history), self.sample(eligible)
        trained = self.trained(rule)
        self.log_start(clients)
        sent = self.ask(state, clients, trained, piggybacked)
        with threads(1):
            aggregation = rule.begin(sent.state.current, step.server_round)
        replies = self._collect(sent, aggregation, piggybacked)
        if piggybacked is not None:
            history = self.evaluation.finish(piggybacked, sent, replies.tally, history)
        self.exchange.require_willing(self.plan.learners, step)
        self.exchange.require_quorum(len(replies.sizes), len(clients) - replies.idle, step)
        state, aggregate = self.basis(state, sent), None
        if replies.sizes:
            state, aggregate = self._aggregate(state, aggregation)
        return state, self.record(sent, replies, aggregate, started, history)

    def trained(self, rule: AggregationRule) -> frozenset[str]:
        """Return the factors that learn in the round, of those that the rule would train."""
        return make_mechanism(self.experiment).trained(rule.trained(self.step.server_round))

    def log_start(self, clients: Mapping[str, str]) -> None:
        """Log who is asked, and about which tasks; client name to task."""
        tasks = sorted(set(clients.values()), key=self.plan.tasks.index)
        self.exchange.event("round_started", self.step, clients=len(clients), tasks=tasks)

    def rule(self, history: History) -> AggregationRule:
        """Return the experiment's, or that which the adapter needs; inside its robust step."""
        config = self.experiment.aggregation
        kind = kind_of(self.experiment.adapter)
        rule = kind.rule or config.rule
        own = config.model_copy(update={"rule": rule})
        return make_rule(own, frozenset(history.distrusted))

    @property
    def eligible(self) -> dict[str, str]:
        """Client name to its task, of those that have one in this round."""
        return self.plan.working(self.step.stage, self.step.server_round)

    def sample(self, eligible: Mapping[str, str]) -> dict[str, str]:
        """Return the clients of the round and their tasks: a seeded choice of
        ``clients_per_round`` over the stable names.

        Args:
            eligible: client name to its task, of those that have one.
        """
        names = [name for name in self.exchange.roster.clients if name in eligible]
        wanted = self.experiment.federation.clients_per_round or len(names)
        place = self.step.stage, self.step.server_round
        generator = seeded(self.experiment.run.seed, "sample", *place)
        order = torch.randperm(len(names), generator=generator)[:wanted].tolist()
        return {names[i]: eligible[names[i]] for i in sorted(order)}

    def ask(
        self,
        state: State,
        clients: Mapping[str, str],
        trained: frozenset[str],
        piggybacked: Step | None,
    ) -> Dispatch:
        """Return the round's requests, and those of the evaluation that goes along; nothing is sent
        yet.

        Args:
            state: of the server; all are sent it, but for what neither is asked about.
            clients: client name to its task.
            trained: factors that learn.
            piggybacked: the step whose evaluation goes along; None: none.
        """
        shown, roster = self.shown(state, piggybacked), self.exchange.roster.clients
        common, requests = self._common(shown, trained), self.instructions(shown, clients, trained)
        if piggybacked is None:
            return self.exchange.ask(shown, common, requests, self.experiment.federation.quorum)
        counting = self.evaluation.request(piggybacked, state)
        return self.exchange.ask(shown, common, carrying(counting, requests, roster))

    def instructions(
        self, shown: State, clients: Mapping[str, str], trained: frozenset[str]
    ) -> dict[str, Instruction]:
        """Return client to what it is asked to learn, or to add up.

        Args:
            shown: the state that it is sent.
            clients: client name to its task.
            trained: factors that learn.
        """
        learns = self.step.phase == LEARN and self.phase.statistics is None
        common = self._common(shown, trained)
        tasks = self.plan.tasks if self.plan.joint_tasks and learns else self.tasks
        asked = training_requests(self.plan, self.step, clients, tasks, common)
        if not self.tasks:
            return asked
        return {  # of the task at hand the records are added up as well
            name: each.model_copy(update={"past": self.plan.worked(name, self.step.stage)})
            for name, each in asked.items()
        }

    def _common(self, shown: State, trained: frozenset[str]) -> Instruction:
        """What is the same in all requests of the round."""
        common = self.exchange.instruction(self.step, shown)
        return common.model_copy(update={"trained": tuple(sorted(trained))})

    def shown(self, state: State, piggybacked: Step | None) -> State:
        """Return what clients need of a state: all of it where questions are answered with it;
        else label heads to take gradients of them, and the adapters unless sums are of the frozen
        model."""
        statistics = self.phase.statistics
        if piggybacked is not None:
            return state
        if statistics is None:
            return replace(state, heads={})
        alpha = self.experiment.adapter.lora_alpha
        nothing = zero_adapter(state.current.shapes, 1, alpha)
        heads = {} if statistics.once else state.heads
        return replace(state, current=nothing, residual=None, heads=heads)

    def basis(self, state: State, sent: Dispatch) -> State:
        """Return what the replies to a round's requests are about, and the server goes on from: the
        state as clients decode it where they train it, and as it is where they take sums."""
        if self.phase.statistics is not None:
            return state
        return replace(sent.state, heads=state.heads)

    def _collect(
        self, sent: Dispatch, aggregation: Aggregation, piggybacked: Step | None
    ) -> RoundReplies:
        """Return what the replies bring, each checked by itself and beside the others; the updates
        that hold are in the aggregation."""
        limits = limits_of(self.experiment)
        alike = make_mechanism(self.experiment).unit is not None
        gathering = Gathering(self.exchange, self.evaluation, self.step, piggybacked, limits, alike)
        return gathering.run(sent, aggregation)

    def _aggregate(self, state: State, aggregation: Aggregation) -> tuple[State, Aggregate | None]:
        """Return the state after the round, and its aggregate; the state before it and None where
        the numbers fail: they cost the round, and never the run.

        Raises:
            UserError: what the rule says to the user.
        """
        try:
            with threads(1):
                aggregate = finished(aggregation)
                return sendable(fold_residual(state, aggregate)), aggregate
        except UserError:
            raise
        except NUMERICAL as fault:
            reason = reason_of(fault)
        self.exchange.event("round_lost", self.step, reason=reason)
        return state, None

    def record(
        self,
        sent: Dispatch,
        replies: RoundReplies,
        aggregate: Aggregate | None,
        started: float,
        history: History,
    ) -> History:
        """Log the round's figures.

        Args:
            sent: the requests.
            replies: what counts of the answers.
            aggregate: None: nothing was aggregated.
            started: when the round did, monotonic seconds.
            history: of the run so far.

        Returns:
            The history with them.
        """
        sizes = replies.sizes
        exact = None if self.phase.statistics is None else 0.0  # sums are; a lost round has none
        figures: dict[str, float | None] = {
            "aggregation_error": aggregate.error if aggregate else exact,
            "bytes_up": sum(sizes.values()) / max(1, len(sizes)),
            "bytes_down": sent.bytes_down,
        }
        excluded = aggregate.excluded if aggregate else ()
        seconds = time.monotonic() - started
        counts = {"clients": len(sizes), "excluded": list(excluded)}
        self.exchange.event("round_finished", self.step, seconds=seconds, **counts, **figures)
        history = history.charged(replies.spent)
        if aggregate is not None:
            history = history.judged(sizes.keys(), excluded)
        return history.after_round(figures).after("train", seconds)
