"""What happens in a round: :class:`DealStrategy`, with the hooks of Flower's strategies.

A strategy belongs to one run, and holds its state. It can be walked by Flower's own loop
(``strategy.start``), or step by step, with a checkpoint after each (:mod:`server.run`).
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from logging import INFO
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from deal_core.aggregation.rules import make_rule
from deal_core.config.experiment import Experiment, counts_in_sum
from deal_core.deal.interface import phases_after, phases_of
from deal_core.errors import UserError
from deal_core.lora.adapter import Shapes, is_nonzero, zero_adapter
from deal_core.lora.kinds import kind_of, rule_of
from deal_core.lora.state import State, to_arrays
from deal_core.methods import method_of
from deal_core.protection import make_mechanism
from deal_core.randomness import seeded
from deal_core.secure_sum.messages import ProtocolError
from deal_core.training.hardware import threads
from deal_core.wire.instruction import LEARN, Instruction
from server import wire
from server.class_sums import ClassSums, PublicLabels, clients_to_ask, tasks_to_sum
from server.clients import Clients, instruction_of
from server.evaluation import Evaluation, MaskedEvaluation, found_worse, without_zeros
from server.measures import pooled
from server.plan import Plan, Step, schedule
from server.results import History
from server.secure_aggregation import SecureAggregation
from server.summation import MaskedUpdates, Summation, Updates


class DealStrategy(Strategy):
    """The rounds of a run: ``steps``, in order. ``state`` and ``history`` are those after the last
    step; at first a checkpoint's, or what the run begins from."""

    def __init__(
        self, clients: Clients, plan: Plan, state: State, history: History | None = None
    ) -> None:
        self.clients, self.plan = clients, plan
        self.state, self.history = state, history or History()
        self._method = method_of(clients.experiment)
        self._mechanism = make_mechanism(clients.experiment)
        self._sums = {name: each.statistics for name, each in phases_of(self._method).items()}
        self.steps = schedule(plan.stages, phases_after(self._method))
        self._labels = PublicLabels(clients.experiment, plan.tasks)
        # Secure sums keep in the run's folder what they must not lose.
        self._secure = SecureAggregation(clients, Path(clients.experiment.run.out))
        self._round: Summation | None = None
        self._evaluation: Evaluation | None = None
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
        log(INFO, "%s rounds in %s stages", self.num_rounds, len(self.plan.stages))

    def play(self, step: Step) -> None:
        """Play one step of the run.

        Raises:
            UserError: fewer valid replies than the quorum; the state and history of before the step
                are those to go on from.
        """
        arrays, config, grid = ArrayRecord(), ConfigRecord(), self.clients.grid
        if step.kind == "zero-shot":
            self._evaluate_start()
        elif step.kind == "round":
            self.configure_train(step.round, arrays, config, grid)
            self.aggregate_train(step.round)
        else:
            self.configure_evaluate(step.round, arrays, config, grid)
            self.aggregate_evaluate(step.round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a round, counted over the whole run from 1; before the first of a
        stage, begin it. What is sent is the strategy's own state, with the experiment's settings.

        Raises:
            UserError: fewer clients than the quorum.
        """
        step, self._round, clients = self._rounds[server_round], None, self.clients
        if step.server_round == 1:
            self.state = self._begun(step)
        summation = self._summation(step)
        if not summation.asked:
            clients.event("round_skipped", step)
            return []
        tasks = sorted(set(summation.asked.values()), key=self.plan.tasks.index)
        clients.event("round_started", step, clients=len(summation.asked), tasks=tasks)
        statistics, shown = self._sums[step.phase], replace(self.state.view(None), heads={})
        if statistics is not None:  # sums of the frozen model; gradients of label heads need these
            shapes, alpha = self.state.current.shapes, clients.experiment.adapter.lora_alpha
            nothing, heads = zero_adapter(shapes, 1, alpha), self.state.heads
            heads = {} if statistics.once else heads
            shown = replace(self.state, current=nothing, residual=None, heads=heads)
        try:
            sent = summation.open(self.state, shown, self._instructions(step, shown, summation))
        except ProtocolError as fault:
            clients.event("round_lost", step, reason=str(fault))
            self._require_participants(step)
            clients.event("round_skipped", step)
            return []
        self._round = summation
        return list(sent.requests.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message] | None = None
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new adapter and the figures of a round; ``replies`` are taken as they come,
        None: the requests are sent now.

        Raises:
            UserError: too few valid replies.
        """
        summation, self._round = self._round, None
        if summation is None:
            return None, None
        step, sent, clients = summation.step, summation.sent, self.clients
        for reply in clients.replies(sent, replies):
            summation.hear(reply)
        valid = summation.close() + summation.hindered
        self._require_participants(step)
        clients.require_quorum(valid, len(sent.instructions) - summation.idle, step)
        before = self.state
        statistics, state, aggregate = self._sums[step.phase], before, None
        if statistics is None:  # as the clients decode it where they train it
            arrived = sent.packed.state
            if state.components:  # which are not sent to be learnt beside
                kept, components = state.retained, state.components
                arrived = replace(arrived, retained=kept, components=components)
            state = replace(arrived, heads=state.heads)
        with clients.may_be_lost("round_lost", step), threads(1):
            after, added = summation.finish(state)
            state, aggregate = wire.sendable(after), added
        self.state = state
        sizes, excluded = summation.sizes, aggregate.excluded if aggregate else ()
        exact = None if statistics is None else 0.0  # sums are; none where lost
        figures: dict[str, float | None] = {
            "aggregation_error": aggregate.error if aggregate else exact,
            "bytes_up": sum(sizes.values()) / max(1, len(sizes)),
            "bytes_down": sent.bytes / max(1, len(sent.requests)),
        }
        seconds = time.monotonic() - summation.started
        counts = {"clients": len(sizes), "excluded": list(excluded)}
        clients.event("round_finished", step, seconds=seconds, **counts, **figures)
        history, less = self.history.charged(summation.spent)
        for client, epsilon in less.items():
            was = history.spent[client].epsilon
            reason = f"epsilon {epsilon:.3g} in its ledger, {was:.3g} before: an older copy of it?"
            clients.event("ledger_older", step, client=client, reason=reason)
        if aggregate is not None:
            history = history.judged(sizes.keys(), excluded)
        self.history = history.appended("train", seconds, **figures)
        self._keep_what_helps(step, before)
        known = {name: value for name, value in figures.items() if value is not None}
        return self.arrays, MetricRecord({**known})

    def _keep_what_helps(self, step: Step, before: State) -> None:
        """Go back to the state before the round where half of the clients say that the class means
        which are new in it make answers worse."""
        statistics, new = self._sums[step.phase], self.state.heads.keys() - before.heads
        alone = statistics is None or not statistics.names
        if alone or not new or self.clients.experiment.privacy.mechanism != "none":
            return
        tasks = [task for task in self.plan.tasks if task in new]
        if found_worse(self.clients, step, self.state, tasks):
            self.clients.event("class_means_rejected", step, tasks=tasks)
            self.state = before

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a stage's evaluation where the round is its last, which ends it.
        Before all, evaluate the start."""
        self._evaluation = None
        self._evaluate_start()
        step = self._ends.get(server_round)
        if step is None:
            return []
        before, tasks = self.state, tuple(self.plan.work(step.stage))
        self.state = self._moved_on(step, lambda: self._method.end_task(before, tasks))
        self._evaluation = self._ask(step, self.state)
        sent = self._evaluation.sent
        return list(sent.requests.values()) if sent is not None else []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message] | None = None
    ) -> MetricRecord | None:
        """Return the accuracy on every task, of the counts of a stage's evaluation; ``replies`` as
        for :meth:`aggregate_train`.

        Raises:
            UserError: fewer answered than the quorum.
        """
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is None:
            return None
        self._evaluated(evaluation, replies)
        sent = evaluation.sent
        if sent is not None:  # as clients decode it; of zeros the rows were not sent
            arrived, current = sent.packed.state, self.state.current
            self.state = arrived if is_nonzero(current) else replace(arrived, current=current)
        self.clients.event("stage_finished", evaluation.step)
        return MetricRecord(dict(pooled(self.history.evaluations[-1], self.plan.tasks)))

    def _evaluate_start(self) -> None:
        if not self.history.evaluations:
            start = start_state(self.clients.experiment, self.state.current.shapes)
            self._evaluated(self._ask(self.steps[1], start))

    def _ask(self, step: Step, state: State) -> Evaluation:
        plan, learnt = self.plan, self.plan.learnt(step.stage)
        tasks = plan.evaluated(step.stage)
        evaluation = Evaluation(self.clients, step, plan.tasks, tasks, learnt)
        self.clients.event("evaluation_started", step, clients=len(self.clients.roster.clients))
        if counts_in_sum(self.clients.experiment):
            evaluation = MaskedEvaluation(
                self.clients, step, plan.tasks, tasks, learnt, secure=self._secure
            )
        evaluation.ask(without_zeros(state))
        return evaluation

    def _evaluated(self, evaluation: Evaluation, replies: Iterable[Message] | None = None) -> None:
        sent, figures = evaluation.sent, {}
        if sent is not None:
            for reply in self.clients.replies(sent, replies):
                evaluation.hear(reply)
        history = evaluation.finish(self.history)
        if sent is not None:
            figures = {"evaluation_bytes_down": sent.bytes / max(1, len(sent.requests))}
        seconds = time.monotonic() - evaluation.started
        self.history = history.appended("evaluate", seconds, **figures)

    def _require_participants(self, step: Step) -> None:
        """Raise UserError where the policy of no client that trains allows what is asked."""
        learners = self.plan.learners
        refuse = bool(learners) and all(map(self.clients.refuses.get, learners))
        if refuse and self._sums[step.phase] is None:
            raise UserError(
                f"{step.kind} {step.server_round} of stage {step.stage}: all clients that train "
                f"({len(learners)}) refuse the experiment by their policy; deal site check "
                "--experiment FILE tells each why; the checkpoint before it stands, continue with "
                "--resume"
            )

    def _summation(self, step: Step) -> Summation:
        clients, plan, statistics = self.clients, self.plan, self._sums[step.phase]
        experiment, stream = clients.experiment, len(plan.tasks)
        if statistics is not None:
            classes = {task: statistics.classes(own) for task, own in self._labels.of.items()}
            summed = tasks_to_sum(plan, step, statistics, self.state, classes)
            several = plan.joint_tasks or experiment.stream.schedule == "per-client"
            return ClassSums(
                clients=clients,
                step=step,
                asked=clients_to_ask(summed, clients.roster.clients),
                tasks=tuple(summed) if several else (),
                secure=self._secure,
                statistics=statistics,
                summed=summed,
                classes=classes,
                stream=stream,
                context=self._labels.context,
            )
        own = rule_of(experiment.adapter, experiment.aggregation)
        config = experiment.aggregation.model_copy(update={"rule": own})
        rule = make_rule(config, frozenset(self.history.distrusted))
        common: dict[str, Any] = {
            "clients": clients,
            "step": step,
            "asked": self._sample(step),
            "tasks": plan.tasks if plan.joint_tasks and step.phase == LEARN else (),
            "trained": self._mechanism.trained(rule.trained),
            "rule": rule,
        }
        if experiment.aggregation.secure:
            return MaskedUpdates(secure=self._secure, stream=stream, **common)
        return Updates(**common)

    def _sample(self, step: Step) -> dict[str, str]:
        """Return client to task: a seeded choice of ``clients_per_round`` by stable names."""
        eligible = self.plan.working(step.stage, step.server_round)
        names = [name for name in self.clients.roster.clients if name in eligible]
        experiment = self.clients.experiment
        wanted = experiment.federation.clients_per_round or len(names)
        generator = seeded(experiment.run.seed, "sample", step.stage, step.server_round)
        order = torch.randperm(len(names), generator=generator)[:wanted].tolist()
        return {names[i]: eligible[names[i]] for i in sorted(order)}

    def _instructions(
        self, step: Step, shown: State, summation: Summation
    ) -> dict[str, Instruction]:
        """Client to what it is asked to learn, or to add up, of the state ``shown`` to it."""
        plan, adds = self.plan, self._sums[step.phase] is not None
        trained = tuple(sorted(summation.trained))
        common = instruction_of(step, shown).model_copy(update={"trained": trained})
        met, future = plan.met(step.stage, step.server_round), plan.future(step.stage)
        learns = step.phase == LEARN and not adds
        ranks = self.clients.experiment.adapter.client_ranks if learns else ()
        turns = cycle(ranks or (common.rank,))
        rank_of = dict(zip(self.clients.roster.clients, turns, strict=False))
        own = {}
        for name, task in summation.asked.items():
            past = plan.past(name, step.stage, step.server_round)
            if adds and summation.tasks:  # of the task at hand the records are added up as well
                past = plan.worked(name, step.stage)
            own[name] = common.model_copy(
                update={
                    "task": task,
                    "tasks": summation.tasks,
                    "seen": tuple(other for other in met if other != task),
                    "future": future,
                    "past": past,
                    "rank": rank_of[name],
                }
            )
        return own

    def _begun(self, step: Step) -> State:
        """Return the state that the stage begins with: a new current adapter, as its kind lays it
        out from public names of labels."""
        before, experiment, labels = self.state, self.clients.experiment, self._labels
        lay_out, own = kind_of(experiment.adapter).begin_task, list(self.plan.work(step.stage))
        generator = seeded(experiment.run.seed, "begin", step.stage)

        def begun() -> State:
            state = self._method.begin_task(before, generator, own)
            if lay_out is None or not own:
                return state
            # Of a task with the very same labels the directions are this one's: it learns on in
            # them.
            same = {frozenset(labels.of[task]) for task in own}
            met = [
                task
                for task in self.plan.met(step.stage)
                if task not in own and frozenset(labels.of[task]) not in same
            ]
            vectors, earlier = labels.vectors(labels.names(own)), labels.names(met)
            others = labels.vectors(earlier) if earlier else vectors[:0]
            return replace(state, current=lay_out(state.current, vectors, others))

        return self._moved_on(step, begun)

    def _moved_on(self, step: Step, change: Callable[[], State]) -> State:
        """Return the state after a change that reads no reply, or the one before where the numbers
        fail."""
        with self.clients.may_be_lost("step_lost", step), threads(1):
            return wire.sendable(change())
        return self.state


def start_state(experiment: Experiment, shapes: Shapes) -> State:
    """Return the state of a run before its first step: all adapters zero."""
    adapter = experiment.adapter
    current = zero_adapter(shapes, adapter.rank, adapter.lora_alpha / adapter.rank)
    return State(current, zero_adapter(shapes, adapter.retained_rank))
