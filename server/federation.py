"""The run: a walk through the schedule, with a checkpoint after every step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from deal_core.adapters import Shapes, stack, zero_adapter
from deal_core.aggregation import (
    Aggregate,
    Aggregation,
    AggregationRule,
    make_rule,
    refuse_beyond,
)
from deal_core.config import Experiment
from deal_core.errors import UserError
from deal_core.instruction import Instruction
from deal_core.methods import LEARN, Method, Phase, State, make_method, phases_of
from deal_core.payload import PayloadError
from deal_core.privacy.mechanisms import make_mechanism
from deal_core.privacy.noise_floor import denoising, singular_floor
from deal_core.privacy.server_side import AsSent, Place, ServerSide
from deal_core.randomness import seeded
from deal_core.threads import threads
from server import wire
from server.checkpoint import Checkpoint, History, Spending, says_spent
from server.dispatch import Dispatch, dispatch
from server.events import EventLog
from server.plan import Plan
from server.roster import Roster
from server.rounds import Reply, collect
from server.schedule import Step


@dataclass(frozen=True)
class Federation:
    """What does not change during a run.

    Attributes:
        roster: the clients of the run.
        side: the privacy mechanism's part at the server.
    """

    grid: Grid
    experiment: Experiment
    roster: Roster
    plan: Plan
    events: EventLog
    side: ServerSide

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
        with threads(1):
            phases = phases_of(self._denoising(state, history))
            return phases[step.phase].begin(state), history

    def _round(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """One round: sample, send, collect, aggregate."""
        started = time.monotonic()
        if step.server_round == 1:
            generator = seeded(self.experiment.run.seed, "begin", step.stage)
            with threads(1):
                state = self._method().begin_task(state, generator)
        eligible = self.plan.working(step.stage, step.server_round)
        if not eligible or not self._phase(step).due(state):
            self._event("round_skipped", step)
            return state, history
        side, working = self._side(step), self._sample(step)
        rule = self._rule(step, history)
        tasks = sorted(set(working.values()), key=self.plan.tasks.index)
        self._event("round_started", step, clients=len(working), tasks=tasks)
        trained = make_mechanism(self.experiment).trained(rule.trained(step.server_round))
        asked = self._instruction(step, state).model_copy(
            update={"trained": tuple(sorted(trained))}
        )
        instructions = self._training(step, working, state, asked)
        with threads(1):
            sent = self._dispatch(state, asked, instructions, MessageType.TRAIN)
        state = sent.state
        place = Place(step.phase, step.stage, step.server_round, len(eligible))
        aggregation = side.begin(rule, state.current, trained, place)
        sizes, idle, spent = self._gather(step, sent, aggregation)
        self._require_quorum(len(sizes), len(working) - idle, step)
        gauge = 0.0
        excluded: tuple[str, ...] = ()
        if sizes or side.releases_noise:
            aggregate = self._finished(step, aggregation)
            state, gauge = absorbed(state, aggregate), aggregate.error
            excluded = aggregate.excluded
        down = sum(wire.payload_bytes(message.content) for message in sent.requests.values())
        figures = {
            "aggregation_error": gauge,
            "bytes_up": sum(sizes.values()) / max(1, len(sizes)),
            "bytes_down": down / max(1, len(sent.requests)),
        }
        seconds = time.monotonic() - started
        counts = {"clients": len(sizes), "excluded": list(excluded)}
        charged = side.spent(list(self.roster.clients))
        told = next(iter(charged.values()), {})  # the same for all
        self._event("round_finished", step, seconds=seconds, **counts, **figures, **told)
        spent |= {name: Spending.model_validate(each) for name, each in charged.items()}
        history = history.judged(sizes.keys(), excluded).charged(spent)
        if step.phase == LEARN:
            history = history.noised(step.server_round == 1, spent)
        return state, history.after_round(figures, _spent(history, "train", started))

    def _finished(self, step: Step, aggregation: Aggregation) -> Aggregate:
        """The round's aggregate.

        Raises:
            UserError: too few updates for the robust step.
        """
        try:
            with threads(1):
                return aggregation.finish()
        except UserError:
            raise
        except ValueError as fault:
            raise UserError(
                f"{step.kind} {step.server_round} of stage {step.stage}: {fault}; let more clients "
                "take part, or start again with another aggregation.robust"
            ) from None

    def _gather(
        self, step: Step, sent: Dispatch, aggregation: Aggregation
    ) -> tuple[dict[str, int], int, dict[str, Spending]]:
        """Give every valid update to the aggregation; return their sizes by client, how many
        clients took no part, and what the others have spent. A faulty reply costs its sender the
        round, and nobody else."""
        sizes: dict[str, int] = {}
        spent: dict[str, Spending] = {}
        idle = 0
        bound = self.experiment.aggregation.norm_bound
        for reply in self._replies(step, sent):
            reader, instruction = sent.readers[reply.client], sent.instructions[reply.client]
            try:
                message = answered(reply)
                update, figures = wire.read_update(reply.client, message, reader, instruction)
                with threads(1):
                    refuse_beyond(update, reader.before, bound)
                    aggregation.add(update)
            except wire.Idle as reason:
                idle += 1
                self._event("client_idle", step, client=reply.client, code=reason.code)
            except ValueError as fault:
                self._event("client_failed", step, client=reply.client, reason=str(fault))
            else:
                sizes[reply.client] = wire.payload_bytes(message.content)
                if says_spent(figures):
                    spent[reply.client] = Spending.model_validate(figures)
                task = instruction.task
                self._event("client_finished", step, client=reply.client, task=task, **figures)
        return sizes, idle, spent

    def _replies(self, step: Step, sent: Dispatch) -> Iterator[Reply]:
        """One reply per client, the absent first; whatever comes beyond that is named and
        dropped."""
        for name in sent.instructions:
            if name not in sent.requests:
                yield Reply(name, None, "not connected")
        deadline = self.experiment.federation.deadline_seconds
        for reply in collect(self.grid, sent.requests, deadline):
            if reply.dropped:
                self._event("reply_dropped", step, client=reply.client, reason=reply.fault)
            else:
                yield reply

    def _end_stage(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Consolidate, then evaluate on all tasks."""
        with threads(1):
            state = self._denoising(state, history).end_task(state)
        state, history = self._evaluate(step, state, history)
        self._event("stage_finished", step)
        return state, history

    def _zero_shot(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Evaluate what the run started from; it is known whatever has been learnt since."""
        _, history = self._evaluate(
            step, start_state(self.experiment, state.current.shapes), history
        )
        return state, history

    def _evaluate(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Every client counts its own right answers on every task, those to come included.

        A registered site that was sent the request and is silent is asked once more: until two
        heartbeats are missed the server takes a lost site for a connected one, and whoever is
        missing takes its tests along. Simulated clients cannot be lost.
        """
        started = time.monotonic()
        asked = self._instruction(step, state).model_copy(update={"tasks": self.plan.tasks})
        sent = self._ask_counts(state, asked, self.roster.clients)
        counts, withheld, silent = self._gather_counts(step, sent)
        if silent and self.roster.patience:
            again = self._ask_counts(state, asked, silent)
            found, kept, _ = self._gather_counts(step, again)
            counts, withheld = counts | found, withheld + kept
        self._require_quorum(len(counts), len(self.roster.clients) - withheld, step)
        ordered = {name: counts[name] for name in self.roster.clients if name in counts}
        history = history.model_copy(
            update={
                "evaluations": (*history.evaluations, ordered),
                "seconds": _spent(history, "evaluate", started),
            }
        )
        accuracy = pooled(ordered, self.plan.tasks, withheld > 0)
        self._event("evaluated", step, accuracy=accuracy)
        return sent.state, history

    def _ask_counts(self, state: State, asked: Instruction, names: Sequence[str]) -> Dispatch:
        with threads(1):
            return self._dispatch(state, asked, dict.fromkeys(names, asked), MessageType.EVALUATE)

    def _gather_counts(
        self, step: Step, sent: Dispatch
    ) -> tuple[dict[str, list[list[int]]], int, list[str]]:
        """Counts by client, how many clients keep theirs, and who was sent the request and is
        silent."""
        counts: dict[str, list[list[int]]] = {}
        withheld = 0
        silent: list[str] = []
        for reply in self._replies(step, sent):
            if reply.message is None and reply.client in sent.requests:
                silent.append(reply.client)
            try:
                counts[reply.client] = wire.read_counts(answered(reply), len(self.plan.tasks))
            except wire.Idle as reason:
                withheld += 1
                self._event("client_idle", step, client=reply.client, code=reason.code)
            except PayloadError as fault:
                self._event("client_failed", step, client=reply.client, reason=str(fault))
        return counts, withheld, silent

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
        ranks = self._ranks(step, state)
        return {
            name: common.model_copy(
                update={
                    "task": task,
                    "tasks": self.plan.tasks if self.plan.together else (),
                    "seen": tuple(other for other in met if other != task),
                    "past": self.plan.past(name, step.stage, step.server_round),
                    "rank": ranks[name],
                }
            )
            for name, task in working.items()
        }

    def _instruction(self, step: Step, state: State) -> Instruction:
        """What is the same for all clients."""
        return Instruction(
            task="",
            stage=step.stage,
            server_round=step.server_round,
            phase=step.phase,
            trained=(),
            rank=state.current.rank,
            retained_rank=state.retained.rank,
            residual_rank=state.residual.rank if state.residual is not None else 0,
            apart=state.apart,
        )

    def _ranks(self, step: Step, state: State) -> dict[str, int]:
        """Rank of the adapter that each client trains: its own where it learns."""
        own = self.experiment.adapter.client_ranks if step.phase == LEARN else ()
        ranks = own or (state.current.rank,)
        return {name: ranks[number % len(ranks)] for number, name in enumerate(self.roster.clients)}

    def _dispatch(
        self,
        state: State,
        common: Instruction,
        instructions: dict[str, Instruction],
        message_type: str,
    ) -> Dispatch:
        """Requests to those who are connected, once enough of them are, or patience ends: a
        quorum to train, all to evaluate, for whoever is missing takes its tests along."""
        everyone = message_type == MessageType.EVALUATE
        share = 1.0 if everyone else self.experiment.federation.quorum
        nodes = self.roster.present(set(instructions), share * len(instructions))
        return dispatch(self.experiment, nodes, state, common, instructions, message_type)

    def _sample(self, step: Step) -> dict[str, str]:
        """Clients of a round and their tasks."""
        working = self.plan.working(step.stage, step.server_round)
        names = [name for name in self.roster.clients if name in working]
        drawn = self._side(step).sample(names, step.stage, step.server_round)
        return {name: working[name] for name in drawn}

    def _side(self, step: Step) -> ServerSide:
        """The mechanism's, unless the round learns from texts that are nobody's."""
        return AsSent(self.experiment) if self._phase(step).public_path else self.side

    def _require_quorum(self, valid: int, asked: int, step: Step) -> None:
        needed = self.experiment.federation.quorum * asked
        if valid < needed:
            raise UserError(
                f"{step.kind} {step.server_round} of stage {step.stage}: {valid} of {asked} "
                f"clients gave a valid reply, the quorum is {needed:g}; the checkpoint before it "
                "stands, continue with --resume (metrics.jsonl has the reasons)"
            )

    def _event(self, event: str, step: Step, **fields: object) -> None:
        where = {"stage": step.stage, "phase": step.phase, "server_round": step.server_round}
        self.events.write(event, **where, **fields)


def answered(reply: Reply) -> Message:
    """The message of a reply; a PayloadError with the reason where there is none."""
    if reply.message is None:
        raise PayloadError(reply.fault)
    return reply.message


def absorbed(state: State, aggregate: Aggregate) -> State:
    """The state after a round: what the current adapter cannot hold joins the residual."""
    gained = [part for part in (state.residual, aggregate.residual) if part is not None]
    return replace(state, current=aggregate.current, residual=stack(gained) if gained else None)


def pooled(
    counts: dict[str, list[list[int]]], tasks: Sequence[str], withheld: bool = False
) -> dict[str, float]:
    """Accuracy per task over all clients' examples; where some are ``withheld``, of the tasks that
    others told.

    Raises:
        UserError: no client has a test example of a task.
    """
    accuracy = {}
    for j, task in enumerate(tasks):
        examples = sum(rows[j][1] for rows in counts.values())
        if examples == 0 and withheld:
            continue
        if examples == 0:
            raise UserError(f"task '{task}' has no test example at any client; add some")
        accuracy[task] = sum(rows[j][0] for rows in counts.values()) / examples
    return accuracy


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


def _spent(history: History, phase: str, started: float) -> dict[str, float]:
    before = history.seconds.get(phase, 0.0)
    return {**history.seconds, phase: before + time.monotonic() - started}
