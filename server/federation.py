"""The run: a walk through the schedule, with a checkpoint after every step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
import torch
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
from deal_core.randomness import seeded
from deal_core.threads import threads
from server import wire
from server.checkpoint import Checkpoint, History
from server.dispatch import Dispatch, dispatch
from server.events import EventLog
from server.rounds import Reply, collect
from server.schedule import Step


@dataclass(frozen=True)
class Federation:
    """What does not change during a run.

    Attributes:
        clients: client name to node id.
        tasks: names in the order they are learnt.
    """

    grid: Grid
    experiment: Experiment
    clients: dict[str, int]
    tasks: list[str]
    events: EventLog

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
            "end-task": self._end_task,
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
            return self._phase(step).begin(state), history

    def _round(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """One round: sample, send, collect, aggregate."""
        started = time.monotonic()
        if step.server_round == 1:
            generator = seeded(self.experiment.run.seed, "begin", step.task_index)
            with threads(1):
                state = self._method().begin_task(state, generator)
        if not self._phase(step).due(state):
            self._event("round_skipped", step)
            return state, history
        rule = self._rule(step, history)
        instruction = self._instruction(step, state, rule.trained(step.server_round))
        chosen = self._sample(step)
        self._event("round_started", step, clients=len(chosen))
        with threads(1):
            sent = self._dispatch(chosen, state, instruction, MessageType.TRAIN)
        state = sent.state
        aggregation = rule.begin(state.current, step.server_round)
        sizes, idle = self._gather(step, sent, aggregation)
        self._require_quorum(len(sizes), len(chosen) - idle, step)
        gauge = 0.0
        excluded: tuple[str, ...] = ()
        if sizes:
            with threads(1):
                aggregate = aggregation.finish()
            state, gauge = absorbed(state, aggregate), aggregate.error
            excluded = aggregate.excluded
        down = sum(wire.payload_bytes(message.content) for message in sent.requests.values())
        figures = {
            "aggregation_error": gauge,
            "bytes_up": sum(sizes.values()) / max(1, len(sizes)),
            "bytes_down": down / len(chosen),
        }
        seconds = time.monotonic() - started
        counts = {"clients": len(sizes), "excluded": list(excluded)}
        self._event("round_finished", step, seconds=seconds, **counts, **figures)
        history = history.judged(sizes.keys(), excluded)
        return state, history.after_round(figures, _spent(history, "train", started))

    def _gather(
        self, step: Step, sent: Dispatch, aggregation: Aggregation
    ) -> tuple[dict[str, int], int]:
        """Give every valid update to the aggregation; return their sizes by client, and how many
        clients had no data. A faulty reply costs its sender the round, and nobody else."""
        sizes: dict[str, int] = {}
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
            except wire.NoData:
                idle += 1
            except ValueError as fault:
                self._event("client_failed", step, client=reply.client, reason=str(fault))
            else:
                sizes[reply.client] = wire.payload_bytes(message.content)
                self._event("client_finished", step, client=reply.client, **figures)
        return sizes, idle

    def _replies(self, step: Step, sent: Dispatch) -> Iterator[Reply]:
        """One reply per client; whatever comes beyond that is named and dropped."""
        deadline = self.experiment.federation.deadline_seconds
        for reply in collect(self.grid, sent.requests, deadline):
            if reply.dropped:
                self._event("reply_dropped", step, client=reply.client, reason=reply.fault)
            else:
                yield reply

    def _end_task(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Consolidate, then evaluate on all tasks."""
        with threads(1):
            state = self._method().end_task(state)
        state, history = self._evaluate(step, state, history)
        self._event("task_finished", step)
        return state, history

    def _zero_shot(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Evaluate what the run started from; it is known whatever has been learnt since."""
        _, history = self._evaluate(
            step, start_state(self.experiment, state.current.shapes), history
        )
        return state, history

    def _evaluate(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Every client counts its own right answers on every task, those to come included."""
        started = time.monotonic()
        instruction = self._instruction(step, state, frozenset())
        with threads(1):
            sent = self._dispatch(list(self.clients), state, instruction, MessageType.EVALUATE)
        counts: dict[str, list[list[int]]] = {}
        for reply in self._replies(step, sent):
            try:
                counts[reply.client] = wire.read_counts(answered(reply), len(self.tasks))
            except PayloadError as fault:
                self._event("client_failed", step, client=reply.client, reason=str(fault))
        self._require_quorum(len(counts), len(self.clients), step)
        ordered = {name: counts[name] for name in self.clients if name in counts}
        history = history.model_copy(
            update={
                "evaluations": (*history.evaluations, ordered),
                "seconds": _spent(history, "evaluate", started),
            }
        )
        self.events.write(
            "evaluated", task_index=step.task_index, accuracy=pooled(ordered, self.tasks)
        )
        return sent.state, history

    def _method(self) -> Method:
        return make_method(self.experiment.method, self.experiment.adapter)

    def _phase(self, step: Step) -> Phase:
        return phases_of(self._method())[step.phase]

    def _rule(self, step: Step, history: History) -> AggregationRule:
        """The experiment's, unless the phase needs another; inside its robust step."""
        config = self.experiment.aggregation
        own = self._phase(step).rule or config.rule
        return make_rule(config.model_copy(update={"rule": own}), frozenset(history.distrusted))

    def _instruction(self, step: Step, state: State, trained: frozenset[str]) -> Instruction:
        index = max(step.task_index, 0)
        return Instruction(
            task=self.tasks[index],
            task_index=step.task_index,
            server_round=step.server_round,
            phase=step.phase,
            tasks=tuple(self.tasks) if step.together or step.kind != "round" else (),
            seen=tuple(self.tasks[:index]),
            trained=tuple(sorted(trained)),
            rank=state.current.rank,
            retained_rank=state.retained.rank,
            residual_rank=state.residual.rank if state.residual is not None else 0,
            apart=state.apart,
        )

    def _dispatch(
        self, chosen: list[str], state: State, instruction: Instruction, message_type: str
    ) -> Dispatch:
        learning = message_type == MessageType.TRAIN and instruction.phase == LEARN
        own = self.experiment.adapter.client_ranks if learning else ()
        ranks = dict.fromkeys(self.clients, state.current.rank)
        for number, name in enumerate(self.clients):
            if own:
                ranks[name] = own[number % len(own)]
        wanted = {name: ranks[name] for name in chosen}
        return dispatch(
            self.experiment, self.clients, chosen, wanted, state, instruction, message_type
        )

    def _sample(self, step: Step) -> list[str]:
        """Clients of a round: a seeded choice over the stable names of those that train."""
        training = {str(number) for number in self.experiment.federation.participants}
        names = [name for name in self.clients if not training or name in training]
        wanted = self.experiment.federation.clients_per_round or len(names)
        generator = seeded(self.experiment.run.seed, "sample", step.task_index, step.server_round)
        order = torch.randperm(len(names), generator=generator)[:wanted].tolist()
        return [names[i] for i in sorted(order)]

    def _require_quorum(self, valid: int, asked: int, step: Step) -> None:
        needed = self.experiment.federation.quorum * asked
        if valid < needed:
            raise UserError(
                f"{step.kind} {step.server_round} of task {step.task_index}: {valid} of {asked} "
                f"clients gave a valid reply, the quorum is {needed:g}; the checkpoint before it "
                "stands, continue with --resume (metrics.jsonl has the reasons)"
            )

    def _event(self, event: str, step: Step, **fields: object) -> None:
        where = {
            "task_index": step.task_index,
            "phase": step.phase,
            "server_round": step.server_round,
        }
        task = self.tasks[step.task_index] if step.task_index >= 0 else ""
        self.events.write(event, task=task, **where, **fields)


def answered(reply: Reply) -> Message:
    """The message of a reply; a PayloadError with the reason where there is none."""
    if reply.message is None:
        raise PayloadError(reply.fault)
    return reply.message


def absorbed(state: State, aggregate: Aggregate) -> State:
    """The state after a round: what the current adapter cannot hold joins the residual."""
    gained = [part for part in (state.residual, aggregate.residual) if part is not None]
    return replace(state, current=aggregate.current, residual=stack(gained) if gained else None)


def pooled(counts: dict[str, list[list[int]]], tasks: list[str]) -> dict[str, float]:
    """Accuracy per task over all clients' examples.

    Raises:
        UserError: no client has a test example of a task.
    """
    accuracy = {}
    for j, task in enumerate(tasks):
        examples = sum(rows[j][1] for rows in counts.values())
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
