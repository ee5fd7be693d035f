"""The run: a walk through the schedule, with a checkpoint after every step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import psutil

from deal_core.aggregation import (
    LORA_B,
    NUMERICAL,
    Aggregate,
    Aggregation,
    AggregationError,
    AggregationRule,
    TooFewUpdates,
    finished,
    make_rule,
    one_line,
    require_finite,
)
from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.lora.adapter import Shapes, compress, stack, zero_adapter
from deal_core.lora.state import State
from deal_core.methods import Method, Phase, Statistics, make_method, phases_of
from deal_core.models import embedding_size
from deal_core.privacy.mechanisms.noise_floor import denoising, singular_floor
from deal_core.privacy.mechanisms.registry import make_mechanism
from deal_core.privacy.mechanisms.server_side import NoServerNoise, RoundContext, ServerSide
from deal_core.randomness import seeded
from deal_core.training.threads import threads
from deal_core.wire.instruction import LEARN, Instruction
from server import wire
from server.checkpoint import Checkpoint, History
from server.dispatch import Dispatch
from server.evaluation import Evaluation, same_model
from server.exchange import Exchange
from server.gathering import Gathering, RoundReplies, limits_of
from server.plan import Plan
from server.schedule import Step
from server.spending import Spending
from server.statistics import SumsGathering, SumsReplies, totals


@dataclass(frozen=True)
class Federation:
    """What does not change during a run.

    Attributes:
        side: the privacy mechanism's part at the server.
    """

    exchange: Exchange
    plan: Plan
    side: ServerSide

    @property
    def experiment(self) -> Experiment:
        """Of the run."""
        return self.exchange.experiment

    @property
    def evaluation(self) -> Evaluation:
        """On all tasks of the plan."""
        return Evaluation(self.exchange, self.plan.tasks, self.plan.learnt)

    def run_step(self, step: Step, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint after ``step``.

        Raises:
            UserError: fewer valid replies than the quorum; the checkpoint before the step
                stands, and the run can be resumed.
        """
        actions: dict[str, Callable[[Step, State, History], tuple[State, History]]] = {
            "zero-shot": self._zero_shot,
            "round": self._round,
            "begin-phase": self._begin_phase,
            "end-stage": self._end_stage,
        }
        state, history = actions[step.kind](step, checkpoint.state, checkpoint.history)
        peak = max(history.peak_rss_bytes, peak_rss_bytes())
        return Checkpoint(
            position=checkpoint.position + 1,
            state=state,
            history=history.model_copy(update={"peak_rss_bytes": peak}),
        )

    def _begin_phase(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Lay out what the rounds of the phase train."""

        def begun() -> State:
            return phases_of(self._denoising(state, history))[step.phase].setup(state)

        return self._moved_on(step, state, begun), history

    def _round(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """One round: sample, send, collect, aggregate."""
        piggybacked_evaluation = None
        if step.server_round == 1:
            state, history, piggybacked_evaluation = self._begin_stage(step, state, history.quiet())
        started = time.monotonic()
        eligible = self.plan.working(step.stage, step.server_round)
        phase = self._phase(step)
        if not eligible or not phase.should_run(state):
            self.exchange.event("round_skipped", step)
            return state, history
        if phase.statistics is not None:
            return self._statistics_round(
                step, state, history, phase.statistics, piggybacked_evaluation
            )
        side, working = self._side(step), self._sample(step)
        rule = self._rule(step, history)
        tasks = sorted(set(working.values()), key=self.plan.tasks.index)
        self.exchange.event("round_started", step, clients=len(working), tasks=tasks)
        trained = make_mechanism(self.experiment).trained(rule.trained(step.server_round))
        sent = self._ask(step, state, working, trained, piggybacked_evaluation)
        state = sent.state
        place = RoundContext(step.phase, step.stage, step.server_round, len(eligible))
        with threads(1):
            aggregation = side.begin(rule, state.current, trained, place)
        gathered = self._gather(step, sent, aggregation, piggybacked_evaluation)
        if piggybacked_evaluation is not None:
            history = self.evaluation.finish(piggybacked_evaluation, sent, gathered.tally, history)
        self.exchange.require_quorum(len(gathered.sizes), len(working) - gathered.idle, step)
        aggregate = None
        if gathered.sizes or side.releases_noise:
            all_there = len(gathered.sizes) == len(working)
            state, aggregate = self._absorbed(step, state, aggregation, all_there)
        return state, self._record_round(step, trained, sent, gathered, aggregate, started, history)

    def _statistics_round(
        self,
        step: Step,
        state: State,
        history: History,
        statistics: Statistics,
        piggybacked_evaluation: Step | None,
    ) -> tuple[State, History]:
        """One round of sums: sample among those that have not given theirs, send, collect, add."""
        started = time.monotonic()
        working = self._sample(step, history.collected if statistics.once else {})
        if not working:
            self.exchange.event("round_skipped", step)
            if piggybacked_evaluation is None:
                return state, history
            return self.evaluation.run(piggybacked_evaluation, state, history)
        tasks = sorted(set(working.values()), key=self.plan.tasks.index)
        self.exchange.event("round_started", step, clients=len(working), tasks=tasks)
        sent = self._ask(step, state, working, frozenset(), piggybacked_evaluation)
        state = sent.state
        size = embedding_size(self.experiment.model)
        gathering = SumsGathering(
            self.exchange,
            self.evaluation,
            step,
            piggybacked_evaluation,
            statistics,
            self._label_counts,
            size,
        )
        gathered = gathering.run(sent)
        if piggybacked_evaluation is not None:
            history = self.evaluation.finish(piggybacked_evaluation, sent, gathered.tally, history)
        self.exchange.require_quorum(len(gathered.sizes), len(working) - gathered.idle, step)
        state, history = self._added(step, state, history, statistics, gathered, working)
        replies = RoundReplies(sizes=gathered.sizes)
        return state, self._record_round(step, frozenset(), sent, replies, None, started, history)

    def _added(
        self,
        step: Step,
        state: State,
        history: History,
        statistics: Statistics,
        gathered: SumsReplies,
        working: dict[str, str],
    ) -> tuple[State, History]:
        """The state with the sums of a round; the one before where the numbers fail."""
        cap = self.experiment.aggregation.weight_cap
        try:
            with threads(1):
                added = totals(gathered, self.exchange.roster.clients, cap)
                state = finite(statistics.absorb(state, added))
        except NUMERICAL as fault:
            self.exchange.event("round_lost", step, reason=told(fault))
            return state, history
        if not statistics.once:
            return state, history
        done: dict[str, list[str]] = {}
        for client in (*gathered.sizes, *gathered.without_data):
            done.setdefault(working[client], []).append(client)
        return state, history.collecting(done)

    @cached_property
    def _label_counts(self) -> dict[str, int]:
        """Task to the number of its labels, which are public."""
        data = self.experiment.data
        source = open_source(data)
        return {
            task: len(data.labels.get(task) or source.load(task).labels) for task in self.plan.tasks
        }

    def _record_round(
        self,
        step: Step,
        trained: frozenset[str],
        sent: Dispatch,
        gathered: RoundReplies,
        aggregate: Aggregate | None,
        started: float,
        history: History,
    ) -> History:
        """The round's figures, for the log and the history."""
        sizes = gathered.sizes
        down = sum(wire.payload_bytes(message.content) for message in sent.requests.values())
        figures = {
            "aggregation_error": aggregate.error if aggregate else 0.0,
            "bytes_up": sum(sizes.values()) / max(1, len(sizes)),
            "bytes_down": down / max(1, len(sent.requests)),
        }
        excluded = aggregate.excluded if aggregate else ()
        charged = self._side(step).spent(list(self.exchange.roster.clients))
        told = next(iter(charged.values()), {})  # the same for all
        seconds = time.monotonic() - started
        counts = {"clients": len(sizes), "excluded": list(excluded)}
        self.exchange.event("round_finished", step, seconds=seconds, **counts, **figures, **told)
        by_server = {name: Spending.model_validate(each) for name, each in charged.items()}
        history = history.charged({**gathered.spent, **by_server})
        if aggregate is not None:
            history = history.judged(sizes.keys(), excluded)
            if step.phase == LEARN and LORA_B in trained:
                own = {name: each for name, each in gathered.spent.items() if name in sizes}
                history = history.noised({**own, **by_server}, len(sizes))
        return history.after_round(figures).after("train", seconds)

    def _begin_stage(
        self, step: Step, state: State, history: History
    ) -> tuple[State, History, Step | None]:
        """The state that the stage begins with; and the step before, where what it left has still
        to be evaluated and the round's requests can carry that along."""
        begun = self._begun(step, state)
        if not self._evaluation_pending(step, history):
            return begun, history, None
        works = self.plan.working(step.stage, 1) and self._phase(step).should_run(begun)
        before = Step("end-stage", step.stage - 1) if step.stage else Step("zero-shot", -1)
        if works and same_model(begun, state):
            return begun, history, before
        if step.stage:  # else the step that evaluates the start is still to come
            state, history = self.evaluation.run(before, state, history)
        return self._begun(step, state), history, None

    def _begun(self, step: Step, state: State) -> State:
        generator = seeded(self.experiment.run.seed, "begin", step.stage)
        return self._moved_on(step, state, lambda: self._method().begin_task(state, generator))

    def _evaluation_pending(self, step: Step, history: History) -> bool:
        """Whether what the stage begins with has not been evaluated: before each stage there are
        more evaluations than its number, zero-shot included. Simulated clients evaluate the start
        by itself."""
        owed = len(history.evaluations) <= step.stage
        return owed and (step.stage > 0 or self._at_sites)

    @property
    def _at_sites(self) -> bool:
        """Whether a message has a price; evaluations are carried along then."""
        return self.exchange.roster.patience > 0

    def _ask(
        self,
        step: Step,
        state: State,
        working: dict[str, str],
        trained: frozenset[str],
        piggybacked_evaluation: Step | None,
    ) -> Dispatch:
        """The round's requests; and of ``piggybacked_evaluation``, which goes along."""
        asked = self.exchange.instruction(step, state).model_copy(
            update={"trained": tuple(sorted(trained))}
        )
        instructions = self._training(step, working, state, asked)
        if piggybacked_evaluation is None:
            quorum = self.experiment.federation.quorum
            return self.exchange.ask(state, asked, instructions, quorum)
        return self.exchange.ask(
            state, asked, self._carrying(piggybacked_evaluation, state, instructions)
        )

    def _carrying(
        self, end: Step, state: State, instructions: dict[str, Instruction]
    ) -> dict[str, Instruction]:
        """Everybody is asked for counts as well: who trains the model as it is, beside that."""
        alone = self.evaluation.request(end, state)
        asked = dict.fromkeys(self.exchange.roster.clients, alone)
        for name, instruction in instructions.items():
            piggybacked_evaluation = alone.tasks if instruction.rank == state.current.rank else ()
            asked[name] = instruction.model_copy(
                update={
                    "piggybacked_evaluation": piggybacked_evaluation,
                    "learnt": alone.learnt if piggybacked_evaluation else (),
                }
            )
        return asked

    def _absorbed(
        self, step: Step, state: State, aggregation: Aggregation, all_there: bool
    ) -> tuple[State, Aggregate | None]:
        """The state after the round, and its aggregate; the state before it and None where the
        numbers fail: they cost the round, and never the run.

        Raises:
            UserError: too few updates for the robust step, though all gave one.
        """
        try:
            with threads(1):
                aggregate = finished(aggregation)
                return finite(fold_residual(state, aggregate)), aggregate
        except UserError:
            raise
        except TooFewUpdates as fault:
            if all_there:
                raise UserError(
                    f"{step.kind} {step.server_round} of stage {step.stage}: {fault}; let more "
                    "clients take part, or start again with another aggregation.robust"
                ) from None
            reason = str(fault)
        except NUMERICAL as fault:
            reason = told(fault)
        self.exchange.event("round_lost", step, reason=reason)
        return state, None

    def _gather(
        self,
        step: Step,
        sent: Dispatch,
        aggregation: Aggregation,
        piggybacked_evaluation: Step | None,
    ) -> RoundReplies:
        public = bool(self._phase(step).public_path)
        limits = limits_of(self.experiment, public, self._side(step).releases_noise)
        alike = self.experiment.privacy.mechanism != "none" and not public
        gathering = Gathering(
            self.exchange, self.evaluation, step, piggybacked_evaluation, limits, alike
        )
        return gathering.run(sent, aggregation)

    def _moved_on(self, step: Step, state: State, change: Callable[[], State]) -> State:
        """The state after a change that reads no reply; the one before where the numbers fail."""
        try:
            with threads(1):
                return finite(change())
        except UserError:
            raise
        except NUMERICAL as fault:
            self.exchange.event("step_lost", step, reason=told(fault))
            return state

    def _end_stage(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Consolidate, then evaluate on all tasks; at sites, with the next stage's first round."""
        before = state
        state = self._moved_on(
            step, before, lambda: self._denoising(before, history).end_task(before)
        )
        last = step.stage == len(self.plan.stages) - 1
        if last or not self._at_sites:
            state, history = self.evaluation.run(step, state, history)
        self.exchange.event("stage_finished", step)
        return state, history

    def _zero_shot(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Evaluate what the run started from, where the first round has not carried that along;
        it is known whatever has been learnt since."""
        if history.evaluations:
            return state, history
        start = start_state(self.experiment, state.current.shapes)
        return state, self.evaluation.run(step, start, history)[1]

    def _method(self) -> Method:
        return make_method(self.experiment.method, self.experiment.adapter)

    def _denoising(self, state: State, history: History) -> Method:
        """The method, told how much of the current adapter the privacy mechanism's noise is."""
        floor = singular_floor(state.current, history.noise_variance)
        return make_method(denoising(self.experiment.method, floor), self.experiment.adapter)

    def _phase(self, step: Step) -> Phase:
        return phases_of(self._method())[step.phase]

    def _rule(self, step: Step, history: History) -> AggregationRule:
        """The experiment's, unless the phase needs another; inside its robust step."""
        config = self.experiment.aggregation
        own = self._phase(step).rule or config.rule
        return make_rule(config.model_copy(update={"rule": own}), frozenset(history.distrusted))

    def _training(
        self, step: Step, working: dict[str, str], state: State, common: Instruction
    ) -> dict[str, Instruction]:
        """What each client is asked: its own task, and what it may know of the others."""
        met = self.plan.met(step.stage, step.server_round)
        future = self.plan.future(step.stage)
        ranks = self._ranks(step, state)
        return {
            name: common.model_copy(
                update={
                    "task": task,
                    "tasks": self.plan.tasks if self.plan.joint_tasks else (),
                    "seen": tuple(other for other in met if other != task),
                    "future": future,
                    "past": self.plan.past(name, step.stage, step.server_round),
                    "rank": ranks[name],
                }
            )
            for name, task in working.items()
        }

    def _ranks(self, step: Step, state: State) -> dict[str, int]:
        """Rank of the adapter that each client trains: its own where it learns."""
        learns = step.phase == LEARN and self._phase(step).statistics is None
        own = self.experiment.adapter.client_ranks if learns else ()
        ranks = own or (state.current.rank,)
        names = self.exchange.roster.clients
        return {name: ranks[number % len(ranks)] for number, name in enumerate(names)}

    def _sample(
        self, step: Step, without: Mapping[str, Collection[str]] = MappingProxyType({})
    ) -> dict[str, str]:
        """Clients of a round and their tasks, ``without`` some of each task."""
        working = {
            name: task
            for name, task in self.plan.working(step.stage, step.server_round).items()
            if name not in without.get(task, ())
        }
        names = [name for name in self.exchange.roster.clients if name in working]
        drawn = self._side(step).sample(names, step.stage, step.server_round)
        return {name: working[name] for name in drawn}

    def _side(self, step: Step) -> ServerSide:
        """The mechanism's, unless the round learns from texts that are nobody's."""
        return NoServerNoise(self.experiment) if self._phase(step).public_path else self.side


def fold_residual(state: State, aggregate: Aggregate) -> State:
    """The state after a round: what the current adapter cannot hold joins the residual, whose rank
    stays below the layers' own."""
    gained = [part for part in (state.residual, aggregate.residual) if part is not None]
    if not gained:
        return replace(state, current=aggregate.current)
    residual = stack(gained)
    full = max(min(shape) for shape in residual.shapes.values())
    if residual.rank > full:
        residual = compress(residual, full)
    return replace(state, current=aggregate.current, residual=residual)


def finite(state: State) -> State:
    """The state itself.

    Raises:
        AggregationError: some number of it is not finite.
    """
    require_finite("the current adapter", state.current)
    require_finite("the retained adapter", state.retained)
    require_finite("the residual", state.residual)
    for name, part in (("a head", state.heads), ("a sum", state.sums)):
        if any(not bool(value.isfinite().all()) for value in part.values()):
            raise AggregationError(f"{name} is not finite")
    return state


def told(fault: Exception) -> str:
    """What failed, for the log."""
    return str(fault) if isinstance(fault, AggregationError) else one_line(fault)


def start_state(experiment: Experiment, shapes: Shapes) -> State:
    """Nothing learnt, nothing retained."""
    adapter = experiment.adapter
    current = zero_adapter(shapes, adapter.rank, adapter.lora_alpha / adapter.rank)
    return State(current, zero_adapter(shapes, adapter.retained_rank))


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, and what the workers it has started hold
    now: their part of what processes share, where the system tells it."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            held = process.memory_full_info()
            workers += getattr(held, "pss", held.rss)
    return own + workers
