"""The run: a walk through the schedule, with a checkpoint after every step. A round has a file of
its own, :mod:`server.round`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from deal_core.aggregation import NUMERICAL
from deal_core.config.experiment import Experiment
from deal_core.data import public_labels
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, Shapes, zero_adapter
from deal_core.lora.kinds import kind_of
from deal_core.lora.state import State
from deal_core.methods import (
    Method,
    Phase,
    SumContext,
    method_of,
    phases_of,
    statistics_of,
)
from deal_core.models import LabelVectors, LanguageModel, label_vectors, load_model
from deal_core.privacy.policy import counts_in_sum
from deal_core.randomness import seeded
from deal_core.training.hardware import threads
from deal_core.training.public_subspace import Subspace, text_vectors
from server.checkpoint import Checkpoint, History
from server.evaluation import Evaluation, same_model
from server.exchange import Exchange
from server.measures import peak_rss_bytes
from server.plan import Plan, Step, StepKind
from server.round import Round, reason_of, sendable
from server.round_sum import RoundSum
from server.secure.evaluation import SecureEvaluation
from server.secure.protocol import SecureLegs
from server.secure.round import SecureRound
from server.statistics_sum import StatisticsSum, found_worse
from server.update_sum import UpdateSum

STOPS = (UserError, torch.OutOfMemoryError)
"""What ends a run, though linear algebra raises its like."""


@dataclass(frozen=True)
class Federation:
    """What does not change during a run."""

    exchange: Exchange
    plan: Plan

    @property
    def experiment(self) -> Experiment:
        """The experiment of the run."""
        return self.exchange.experiment

    @property
    def evaluation(self) -> Evaluation:
        """On all tasks of the plan."""
        return Evaluation(self.exchange, self.plan.tasks, self.plan.learnt)

    def _evaluate(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Evaluate a state on all tasks."""
        if counts_in_sum(self.experiment):
            secure = SecureEvaluation(self.evaluation, self._secure_legs)
            return secure.run(step, state, history)
        return self.evaluation.run(step, state, history)

    def run_step(self, step: Step, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint after ``step``.

        Raises:
            UserError: fewer valid replies than the quorum; the checkpoint before the step
                stands, and the run can be resumed.
        """
        actions: dict[str, Callable[[Step, State, History], tuple[State, History]]] = {
            "zero-shot": self._zero_shot,
            "round": self._round,
            "end-stage": self._end_stage,
        }
        state, history = actions[step.kind](step, checkpoint.state, checkpoint.history)
        peak = max(history.peak_rss_bytes, peak_rss_bytes())
        return Checkpoint(
            position=checkpoint.position + 1,
            state=state,
            history=history.model_copy(update={"peak_rss_bytes": peak}),
        )

    def _round(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """One round; before the first of a stage, what the stage begins with."""
        piggybacked = None
        if step.server_round == 1:
            state, history, piggybacked = self._begin_stage(step, state, history)
        phase = self._phase(step)
        one = Round(self.exchange, self.evaluation, self.plan, phase, step)
        added: RoundSum
        if phase.statistics is not None:
            tasks = self._tasks_to_sum(step, phase.statistics.once, state)
            several = self.plan.joint_tasks or self.experiment.stream.schedule == "per-client"
            one = replace(one, tasks=tuple(tasks) if several else ())
            labels = self._label_counts
            added = StatisticsSum(one, phase.statistics, tasks, labels, self._sum_context)
        elif self.experiment.aggregation.secure:
            added = UpdateSum(one, one.rule(history))
        else:
            return one.run(state, history, piggybacked)
        secure = SecureRound(one, added, self._secure_legs)
        after, history = secure.run(state, history, piggybacked)
        return self._useful(step, phase, state, after), history

    def _useful(self, step: Step, phase: Phase, before: State, after: State) -> State:
        """Return the state after a round, or the one before where most clients say that the class
        means which are new in it make answers worse."""
        statistics, new = phase.statistics, after.heads.keys() - before.heads.keys()
        alone = statistics is None or not statistics.names
        if alone or not new or self.experiment.privacy.mechanism != "none":
            return after
        tasks = [task for task in self.plan.tasks if task in new]
        if not found_worse(self.exchange, step, after, tasks):
            return after
        self.exchange.event("class_means_rejected", step, tasks=tasks)
        return before

    def _tasks_to_sum(self, step: Step, once: bool, state: State) -> dict[str, list[str]]:
        """Return the tasks whose records are added up in a round, each to its clients. What is
        taken ``once`` is taken in the stage in which the last client works on the task; answers
        that are texts have no sums."""
        if once:
            ended = self.plan.ended(step.stage)
            tasks = {task: own for task, own in ended.items() if task not in state.heads}
        else:
            tasks = self.plan.at_work(step.stage, step.server_round)
        return {task: clients for task, clients in tasks.items() if self._label_counts[task]}

    def _sum_context(self, tasks: Sequence[str], deviation: float) -> SumContext:
        """What the server knows of class sums: what follows from public texts and names."""
        statistics = statistics_of(self._method())
        if not tasks or statistics is None:
            return SumContext(deviation, {}, None)
        subspace, layers = self._subspace, statistics.layers
        names = {
            task: subspace.project(
                text_vectors(self._model, self._labels[task], layers, self._labels[task])
            )
            for task in tasks
        }
        return SumContext(deviation, names, subspace)

    @cached_property
    def _subspace(self) -> Subspace:
        """The public directions in which clients add up their records."""
        statistics = statistics_of(self._method())
        assert statistics is not None
        spaces = list(self._labels.values())
        return statistics.subspace(self.experiment.data, self._model, spaces)

    @cached_property
    def _secure_legs(self) -> SecureLegs:
        return SecureLegs(self.exchange, Path(self.experiment.run.out))

    @cached_property
    def _label_counts(self) -> dict[str, int]:
        """Task to the number of its labels."""
        return {task: len(labels) for task, labels in self._labels.items()}

    @cached_property
    def _labels(self) -> dict[str, Sequence[str]]:
        """Task to its labels, which are public."""
        return {task: public_labels(self.experiment.data, task) for task in self.plan.tasks}

    def _begin_stage(
        self, step: Step, state: State, history: History
    ) -> tuple[State, History, Step | None]:
        """Return the state that the stage begins with, and the history; and the step before, where
        what it left has still to be evaluated and the round's requests can carry that along (else
        None)."""
        begun = self._begun(step, state)
        if not self._evaluation_pending(step, history):
            return begun, history, None
        works = bool(self.plan.working(step.stage, 1))
        kind: StepKind = "end-stage" if step.stage else "zero-shot"
        before = Step(kind, step.stage - 1, round=step.round - 1)
        if works and same_model(begun, state):
            return begun, history, before
        if step.stage:  # else the step that evaluates the start is still to come
            state, history = self._evaluate(before, state, history)
        return self._begun(step, state), history, None

    def _begun(self, step: Step, state: State) -> State:
        generator = seeded(self.experiment.run.seed, "begin", step.stage)

        def begun() -> State:
            after = self._method().begin_task(state, generator)
            return replace(after, current=self._of_its_kind(step, after))

        return self._moved_on(step, state, begun)

    def _of_its_kind(self, step: Step, state: State) -> Adapter:
        """Return the stage's new adapter as its kind lays it out, from public names of labels."""
        begin_task = kind_of(self.experiment.adapter).begin_task
        own = list(self.plan.work(step.stage))
        if begin_task is None or not own:
            return state.current
        # Of a task with the very same labels the directions are this one's: it learns on in them.
        same = {frozenset(self._labels[task]) for task in own}
        met = [
            task
            for task in self.plan.met(step.stage)
            if task not in own and frozenset(self._labels[task]) not in same
        ]
        labels, earlier = self._label_vectors(self._labels_of(own)), self._labels_of(met)
        avoided = self._label_vectors(earlier) if earlier else labels[:0]
        return begin_task(state.current, labels, avoided)

    @cached_property
    def _model(self) -> LanguageModel:
        """The base model at the server, for what follows from public names alone."""
        config = self.experiment
        return load_model(config.model, config.adapter, config.train.max_length)

    @cached_property
    def _label_vectors(self) -> LabelVectors:
        return label_vectors(self.experiment.model)

    def _labels_of(self, tasks: Sequence[str]) -> list[str]:
        return [label for task in tasks for label in self._labels[task]]

    def _evaluation_pending(self, step: Step, history: History) -> bool:
        """Return whether what the stage begins with has not been evaluated: before each stage there
        are more evaluations than its number, zero-shot included. Simulated clients evaluate the
        start by itself."""
        owed = len(history.evaluations) <= step.stage
        return owed and (step.stage > 0 or self._at_sites)

    @property
    def _at_sites(self) -> bool:
        """Whether a message has a price; evaluations are carried along then, but for those that are
        sums of their own."""
        return self.exchange.roster.patience > 0 and not counts_in_sum(self.experiment)

    def _moved_on(self, step: Step, state: State, change: Callable[[], State]) -> State:
        """Return the state after a change that reads no reply, or the one before where the numbers
        fail. Memory that is not there stops the run, which can go on elsewhere."""
        try:
            with threads(1):
                return sendable(change())
        except STOPS:
            raise
        except NUMERICAL as fault:
            self.exchange.event("step_lost", step, reason=reason_of(fault))
            return state

    def _end_stage(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Consolidate, then evaluate on all tasks; at sites, with the next stage's first round."""
        before = state
        state = self._moved_on(step, before, lambda: self._method().end_task(before))
        last = step.stage == len(self.plan.stages) - 1
        if last or not self._at_sites:
            state, history = self._evaluate(step, state, history)
        self.exchange.event("stage_finished", step)
        return state, history

    def _zero_shot(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Return the state as it is, and the history with the evaluation of what the run started
        from: made now where the first round has not carried it along, since that is known whatever
        has been learnt since."""
        if history.evaluations:
            return state, history
        start = start_state(self.experiment, state.current.shapes)
        return state, self._evaluate(step, start, history)[1]

    def _method(self) -> Method:
        return method_of(self.experiment)

    def _phase(self, step: Step) -> Phase:
        return phases_of(self._method())[step.phase]


def start_state(experiment: Experiment, shapes: Shapes) -> State:
    """Return the state of a run before its first step: all adapters zero."""
    adapter = experiment.adapter
    current = zero_adapter(shapes, adapter.rank, adapter.lora_alpha / adapter.rank)
    return State(current, zero_adapter(shapes, adapter.retained_rank))
