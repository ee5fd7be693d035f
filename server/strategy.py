"""What happens in a round: :class:`DealStrategy`, with the hooks of Flower's strategies.

A strategy belongs to one run, and holds its state. It can be walked by Flower's own loop
(``strategy.start``), or step by step, with a checkpoint after each (:mod:`server.run`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import cycle
from logging import INFO
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from deal_core.aggregation import (
    NUMERICAL,
    Aggregate,
    AggregationFailed,
    make_rule,
    one_line,
    require_finite,
)
from deal_core.config.experiment import Experiment, counts_in_sum
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, Shapes, zero_adapter
from deal_core.lora.arrays import to_arrays
from deal_core.lora.kinds import kind_of, rule_of
from deal_core.lora.state import State
from deal_core.methods import Statistics, method_of, phases_after, phases_of
from deal_core.protection import make_mechanism
from deal_core.randomness import seeded
from deal_core.secure_sum.messages import ProtocolError
from deal_core.training.hardware import threads
from deal_core.wire.adapter_record import require_bounded
from deal_core.wire.instruction import LEARN, Instruction
from server import wire
from server.checkpoint import History
from server.class_sums import ClassSums, PublicLabels, found_worse, tasks_to_sum
from server.clients import Clients, Reply, Sent, instruction_of
from server.evaluation import (
    Evaluation,
    MaskedEvaluation,
    decoded,
    pooled,
    same_model,
    without_zeros,
)
from server.plan import Plan, Step, StepKind, schedule
from server.results import Spending
from server.secure_aggregation import SecureAggregation
from server.summation import MaskedSum, Summation, Updates, UpdateSum

STOPS = (UserError, torch.OutOfMemoryError)
"""What ends a run, though linear algebra raises its like."""


@dataclass
class Round:
    """A round, or an evaluation, whose requests are out.

    Attributes:
        started: when, monotonic seconds.
        before: the state that it is about.
        summation: what the round adds up; None: it is an evaluation alone.
        evaluation: the evaluation that it is, or that the requests carry along; None: none.
        spent: what privacy has cost, by client that says so, whether or not its update counts.
        idle: how many clients took no part.
        hindered: how many could not, by what another site sent.
    """

    step: Step
    started: float
    before: State
    sent: Sent | None
    summation: Summation | None = None
    evaluation: Evaluation | None = None
    spent: dict[str, Spending] = field(default_factory=dict)
    idle: int = 0
    hindered: int = 0


class DealStrategy(Strategy):
    """The rounds of a run.

    Args:
        clients: of the run.
        plan: who works on what.
        state: what the run begins from, or a checkpoint's.
        history: of a checkpoint; None: the run begins.
        folder: of the run: secure sums keep there what they must not lose.

    Attributes:
        state: after the last step.
        history: what has been measured so far.
        steps: of the run, in order.
    """

    def __init__(
        self,
        clients: Clients,
        plan: Plan,
        state: State,
        history: History | None = None,
        folder: Path | None = None,
    ) -> None:
        self.clients, self.plan = clients, plan
        self.state, self.history = state, history or History()
        self._method = method_of(clients.experiment)
        self._phases = phases_of(self._method)
        self.steps = schedule(plan.stages, phases_after(self._method))
        self._labels = PublicLabels(clients.experiment, plan.tasks)
        self._secure = SecureAggregation(clients, folder or Path(clients.experiment.run.out))
        self._round: Round | None = None
        self._rounds = {step.round: step for step in self.steps if step.kind == "round"}
        self._ends = {step.round: step for step in self.steps if step.kind == "end-stage"}

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return len(self._rounds)

    @property
    def arrays(self) -> ArrayRecord:
        """The current adapter; the strategy itself has the rest of the state."""
        return wire.as_record(to_arrays(self.state.current))

    def summary(self) -> None:
        """Log what the strategy does."""
        config = self.clients.experiment
        log(
            INFO,
            "method %s, %s rounds in %s stages, rule %s",
            config.method.name,
            self.num_rounds,
            len(self.plan.stages),
            rule_of(config.adapter, config.aggregation),
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a round of the run; before the first of a stage, begin it.

        Args:
            server_round: number over the whole run, from 1.
            arrays: as the strategy has given them; its own state is what is sent.
            config: nothing: the experiment has all settings.
            grid: that of the clients.

        Raises:
            UserError: fewer clients than the quorum.
        """
        step, self._round = self._rounds[server_round], None
        evaluation = self._begin_stage(step) if step.server_round == 1 else None
        started, state, clients = time.monotonic(), self.state, self.clients
        summation = self._summation(step)
        if not summation.asked:
            return self._skipped(step, evaluation)
        tasks = sorted(set(summation.asked.values()), key=self.plan.tasks.index)
        clients.event("round_started", step, clients=len(summation.asked), tasks=tasks)
        shown = state if evaluation is not None else self._shown(step)
        instructions = self._instructions(step, shown, summation)
        try:
            secure = summation.open(state, shown, instructions)
        except ProtocolError as fault:
            clients.event("round_lost", step, reason=str(fault))
            self._require_participants(step)
            return self._skipped(step, evaluation)
        instructions = {name: each for name, each in instructions.items() if name in secure}
        if evaluation is None:
            quorum = clients.experiment.federation.quorum
            sent = clients.ask(step, shown, instructions, quorum, secure)
        else:
            asked = evaluation.beside(state, instructions)
            sent = clients.ask(step, shown, asked, secure=secure)
        summation.begin(sent)
        self._round = Round(step, started, state, sent, summation, evaluation)
        return list(sent.requests.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new adapter and the figures of a round; replies are taken as they come.

        Raises:
            UserError: too few valid replies.
        """
        one, self._round = self._round, None
        if one is None or one.summation is None or one.sent is None:
            return None, None
        step, sent, summation = one.step, one.sent, one.summation
        for reply in self.clients.replies(sent, replies):
            if one.evaluation is not None:
                one.evaluation.hear(reply, sent)
            if sent.instructions[reply.client].task:
                self._hear(one, summation, reply)
        valid = summation.close() + one.hindered
        asked = sum(bool(each.task) for each in sent.instructions.values())
        self._require_participants(step)
        self.clients.require_quorum(valid, asked - one.idle, step)
        if one.evaluation is not None:
            self.history = one.evaluation.finish(sent, self.history)
        self.state, aggregate = self._finished(one, sent, summation)
        figures = self._record(one, sent, summation, aggregate)
        self._keep_what_helps(one)
        known = {name: value for name, value in figures.items() if value is not None}
        return self.arrays, MetricRecord({**known})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a stage's evaluation where the round is its last, which ends it,
        and the next stage's first round does not carry them. Before all, evaluate the start.

        Args:
            server_round: number over the whole run, from 1.
            arrays: see :meth:`configure_train`, as for the others.
            config: nothing.
            grid: that of the clients.
        """
        self._round = None
        self.evaluate_start()
        step = self._ends.get(server_round)
        if step is None:
            return []
        before = self.state
        self.state = self._moved_on(step, lambda: self._method.end_task(before))
        if self._at_sites and step.stage < len(self.plan.stages) - 1:
            self.clients.event("stage_finished", step)
            return []
        self._round = self._asked(step, self.state)
        return list(self._round.sent.requests.values()) if self._round.sent is not None else []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the accuracy on every task, of the counts of a stage's evaluation.

        Raises:
            UserError: fewer answered than the quorum.
        """
        one, self._round = self._round, None
        if one is None:
            return None
        self.state = self._evaluated(one, replies)
        self.clients.event("stage_finished", one.step)
        return MetricRecord(dict(pooled(self.history.evaluations[-1], self.plan.tasks, True)))

    def play(self, step: Step) -> None:
        """Play one step of the run.

        Raises:
            UserError: fewer valid replies than the quorum; the state and history of before the step
                are those to go on from.
        """
        arrays, config, grid = ArrayRecord(), ConfigRecord(), self.clients.grid
        if step.kind == "zero-shot":
            self.evaluate_start()
        elif step.kind == "round":
            self.configure_train(step.round, arrays, config, grid)
            self.aggregate_train(step.round, self._messages())
        else:
            self.configure_evaluate(step.round, arrays, config, grid)
            self.aggregate_evaluate(step.round, self._messages())

    def _messages(self) -> Iterable[Message]:
        """Send the requests of the round, and return what arrives."""
        sent = self._round.sent if self._round is not None else None
        return self.clients.messages(sent) if sent is not None else ()

    def evaluate_start(self) -> None:
        """Evaluate what the run began with, unless that is known: by now, or since the first round
        has carried it along."""
        if not self.history.evaluations:
            start = start_state(self.clients.experiment, self.state.current.shapes)
            self._evaluated(self._asked(self.steps[1], start))

    def _skipped(self, step: Step, evaluation: Evaluation | None) -> list[Message]:
        """Leave a round out; evaluate alone what it should have carried along."""
        if evaluation is not None:
            self.state = self._evaluated(self._asked(evaluation.step, self.state))
        self.clients.event("round_skipped", step)
        return []

    def _require_participants(self, step: Step) -> None:
        if self._statistics(step) is None:
            self.clients.require_participants(self.plan.learners, step)

    def _statistics(self, step: Step) -> Statistics | None:
        return self._phases[step.phase].statistics

    def _summation(self, step: Step) -> Summation:
        """What the round adds up."""
        clients, plan, statistics = self.clients, self.plan, self._statistics(step)
        experiment, secure = clients.experiment, self._secure
        if statistics is not None:
            labels = {task: len(own) for task, own in self._labels.of.items()}
            tasks = tasks_to_sum(plan, step, statistics, self.state, labels)
            several = plan.joint_tasks or experiment.stream.schedule == "per-client"
            context = self._labels.context
            sums = ClassSums(clients, step, statistics, tasks, labels, len(plan.tasks), context)
            return MaskedSum(
                clients=clients,
                step=step,
                asked=sums.asked,
                tasks=tuple(tasks) if several else (),
                secure=secure,
                layout=sums.layout,
                absorb=sums.absorb,
            )
        own = rule_of(experiment.adapter, experiment.aggregation)
        config = experiment.aggregation.model_copy(update={"rule": own})
        rule = make_rule(config, frozenset(self.history.distrusted))
        trained = make_mechanism(experiment).trained(rule.trained(step.server_round))
        common: dict[str, Any] = {
            "clients": clients,
            "step": step,
            "asked": self._sample(step),
            "tasks": plan.tasks if plan.joint_tasks and step.phase == LEARN else (),
            "trained": trained,
        }
        if not experiment.aggregation.secure:
            return Updates(rule=rule, **common)
        own_sum = UpdateSum(experiment, step, rule, trained, len(plan.tasks))
        return MaskedSum(secure=secure, layout=own_sum.layout, absorb=own_sum.absorb, **common)

    def _sample(self, step: Step) -> dict[str, str]:
        """Return the clients of a round and their tasks: a seeded choice of ``clients_per_round``
        over the stable names of those that have one."""
        eligible = self.plan.working(step.stage, step.server_round)
        names = [name for name in self.clients.roster.clients if name in eligible]
        experiment = self.clients.experiment
        wanted = experiment.federation.clients_per_round or len(names)
        generator = seeded(experiment.run.seed, "sample", step.stage, step.server_round)
        order = torch.randperm(len(names), generator=generator)[:wanted].tolist()
        return {names[i]: eligible[names[i]] for i in sorted(order)}

    def _shown(self, step: Step) -> State:
        """Return what clients need of the state: label heads to take gradients of them, and the
        adapters unless sums are of the frozen model."""
        statistics, state = self._statistics(step), self.state
        if statistics is None:
            return replace(state, heads={})
        nothing = zero_adapter(state.current.shapes, 1, self.clients.experiment.adapter.lora_alpha)
        heads = {} if statistics.once else state.heads
        return replace(state, current=nothing, residual=None, heads=heads)

    def _instructions(
        self, step: Step, shown: State, summation: Summation
    ) -> dict[str, Instruction]:
        """Return client to what it is asked to learn, or to add up; ``shown``: the state that it is
        sent."""
        plan, adds = self.plan, self._statistics(step) is not None
        trained = tuple(sorted(summation.trained))
        common = instruction_of(step, shown).model_copy(update={"trained": trained})
        met, future = plan.met(step.stage, step.server_round), plan.future(step.stage)
        learns = step.phase == LEARN and not adds
        ranks = self.clients.experiment.adapter.client_ranks if learns else ()
        turns = cycle(ranks or (common.rank,))
        rank_of = dict(zip(self.clients.roster.clients, turns, strict=False))

        def past(name: str) -> tuple[str, ...]:
            if adds and summation.tasks:  # of the task at hand the records are added up as well
                return plan.worked(name, step.stage)
            return plan.past(name, step.stage, step.server_round)

        return {
            name: common.model_copy(
                update={
                    "task": task,
                    "tasks": summation.tasks,
                    "seen": tuple(other for other in met if other != task),
                    "future": future,
                    "past": past(name),
                    "rank": rank_of[name],
                }
            )
            for name, task in summation.asked.items()
        }

    def _hear(self, one: Round, summation: Summation, reply: Reply) -> None:
        """Take a reply to a training request; a bad one costs its sender the round."""
        client, clients, step = reply.client, self.clients, one.step
        assert one.sent is not None
        instruction, spent = one.sent.instructions[client], None
        try:
            message = reply.answered()
            figures, spent = wire.read_figures(message, instruction, summation.record)
            if spent is not None:  # it is charged there, whatever is found wrong here
                one.spent[client] = spent
            summation.add(client, message, figures["num_examples"])
        except wire.ClientSkipped as reason:
            one.idle += 1
            clients.record_refusal(client, reason.code == wire.BY_POLICY)
            summation.skipped(client, reason)
        except NUMERICAL as fault:
            clients.record_fault(client, step, fault, spent)
            one.hindered += summation.hindered(reply)
        else:
            clients.record_refusal(client, False)
            clients.event("client_finished", step, client=client, task=instruction.task, **figures)
            summation.settle()

    def _finished(
        self, one: Round, sent: Sent, summation: Summation
    ) -> tuple[State, Aggregate | None]:
        """Return the state after the round, and its aggregate. Where the sum or its numbers fail
        the round is skipped, and the run continues: the state before it, as the clients decode it
        where they train it, and None.

        Raises:
            UserError: what the rule says to the user, or two sites are one.
        """
        state = one.before
        if self._statistics(one.step) is None:
            state = replace(sent.packed.state, heads=state.heads)
        with self.clients.may_be_lost("round_lost", one.step), threads(1):
            after, aggregate = summation.finish(state)
            return sendable(after), aggregate
        return state, None

    def _record(
        self, one: Round, sent: Sent, summation: Summation, aggregate: Aggregate | None
    ) -> dict[str, float | None]:
        """Log the round's figures, and write them into the history."""
        sizes = summation.sizes
        exact = None if self._statistics(one.step) is None else 0.0  # sums are; none where lost
        figures: dict[str, float | None] = {
            "aggregation_error": aggregate.error if aggregate else exact,
            "bytes_up": sum(sizes.values()) / max(1, len(sizes)),
            "bytes_down": sent.bytes_down,
        }
        excluded = aggregate.excluded if aggregate else ()
        seconds = time.monotonic() - one.started
        counts = {"clients": len(sizes), "excluded": list(excluded)}
        self.clients.event("round_finished", one.step, seconds=seconds, **counts, **figures)
        history = self.history.charged(one.spent)
        if aggregate is not None:
            history = history.judged(sizes.keys(), excluded)
        self.history = history.after_round(figures).after("train", seconds)
        return figures

    def _keep_what_helps(self, one: Round) -> None:
        """Go back to the state before the round where most clients say that the class means which
        are new in it make answers worse."""
        statistics, new = self._statistics(one.step), self.state.heads.keys() - one.before.heads
        alone = statistics is None or not statistics.names
        if alone or not new or self.clients.experiment.privacy.mechanism != "none":
            return
        tasks = [task for task in self.plan.tasks if task in new]
        if found_worse(self.clients, one.step, self.state, tasks):
            self.clients.event("class_means_rejected", one.step, tasks=tasks)
            self.state = one.before

    def _begin_stage(self, step: Step) -> Evaluation | None:
        """Return the evaluation of what the stage before has left, where it has still to be made
        and the requests of the round can carry it along; else make it now. Begin the stage."""
        begun = self._begun(step)
        # Before each stage there are more evaluations than its number, zero-shot included.
        owed = len(self.history.evaluations) <= step.stage and (step.stage > 0 or self._at_sites)
        if owed:
            kind: StepKind = "end-stage" if step.stage else "zero-shot"
            before = Step(kind, step.stage - 1, round=step.round - 1)
            if self.plan.working(step.stage, 1) and same_model(begun, self.state):
                self.state = begun
                return self._evaluation(before)
            if step.stage:  # else the start is evaluated after the round
                self.state = self._evaluated(self._asked(before, self.state))
                begun = self._begun(step)
        self.state = begun
        return None

    def _begun(self, step: Step) -> State:
        """The state that the stage begins with: a new current adapter, as its kind lays it out."""
        state, experiment = self.state, self.clients.experiment
        generator = seeded(experiment.run.seed, "begin", step.stage)

        def begun() -> State:
            after = self._method.begin_task(state, generator)
            return replace(after, current=self._of_its_kind(step, after.current))

        return self._moved_on(step, begun)

    def _of_its_kind(self, step: Step, current: Adapter) -> Adapter:
        """The stage's new adapter as its kind lays it out, from public names of labels."""
        begin_task = kind_of(self.clients.experiment.adapter).begin_task
        own, labels = list(self.plan.work(step.stage)), self._labels
        if begin_task is None or not own:
            return current
        # Of a task with the very same labels the directions are this one's: it learns on in them.
        same = {frozenset(labels.of[task]) for task in own}
        met = [
            task
            for task in self.plan.met(step.stage)
            if task not in own and frozenset(labels.of[task]) not in same
        ]
        vectors, earlier = labels.vectors(labels.names(own)), labels.names(met)
        return begin_task(current, vectors, labels.vectors(earlier) if earlier else vectors[:0])

    def _moved_on(self, step: Step, change: Callable[[], State]) -> State:
        """Return the state after a change that reads no reply, or the one before where the numbers
        fail. Memory that is not there stops the run, which can go on elsewhere."""
        try:
            with threads(1):
                return sendable(change())
        except STOPS:
            raise
        except NUMERICAL as fault:
            told = isinstance(fault, AggregationFailed)
            self.clients.event("step_lost", step, reason=str(fault) if told else one_line(fault))
            return self.state

    @property
    def _at_sites(self) -> bool:
        """Whether a message has a price; evaluations are carried along then, but for those that are
        sums of their own."""
        return self.clients.roster.patience > 0 and not counts_in_sum(self.clients.experiment)

    def _evaluation(self, step: Step) -> Evaluation:
        tasks, learnt = self.plan.tasks, self.plan.learnt(step.stage)
        if counts_in_sum(self.clients.experiment):
            return MaskedEvaluation(self.clients, step, tasks, learnt, secure=self._secure)
        return Evaluation(self.clients, step, tasks, learnt)

    def _asked(self, step: Step, state: State) -> Round:
        """An evaluation of a state, with its requests."""
        started, evaluation = time.monotonic(), self._evaluation(step)
        sent = evaluation.ask(without_zeros(state))
        return Round(step, started, state, sent, evaluation=evaluation)

    def _evaluated(self, one: Round, replies: Iterable[Message] | None = None) -> State:
        """Return the state that was evaluated, as clients decode it; the history has the counts.

        Raises:
            UserError: fewer answered than the quorum.
        """
        evaluation, sent, state = one.evaluation, one.sent, one.before
        assert evaluation is not None
        if sent is not None:
            for reply in self.clients.replies(sent, replies):
                evaluation.hear(reply, sent)
        history = evaluation.finish(sent, self.history)
        if sent is not None:
            history = history.after_round({"evaluation_bytes_down": sent.bytes_down})
            state = decoded(sent, state)
        self.history = history.after("evaluate", time.monotonic() - one.started)
        return state


def start_state(experiment: Experiment, shapes: Shapes) -> State:
    """Return the state of a run before its first step: all adapters zero."""
    adapter = experiment.adapter
    current = zero_adapter(shapes, adapter.rank, adapter.lora_alpha / adapter.rank)
    return State(current, zero_adapter(shapes, adapter.retained_rank))


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
