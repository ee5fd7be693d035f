"""Evaluations: every client counts its own right answers on every task, those to come included.

The model that a stage ends with is the model that the next one begins with. So where a message has
a price, which is at sites, the first training request of a stage carries the evaluation of the one
before along, and clients that do not train in that round are asked in the same breath.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from deal_core.errors import UserError
from deal_core.lora.adapter import is_nonzero, relative_difference, stack, zero_adapter
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.models import has_label_logits
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import count_names
from server import wire
from server.checkpoint import History
from server.dispatch import Dispatch
from server.exchange import Exchange, answered
from server.plan import Step
from server.reply_collection import Reply

Counts = list[list[int | float]]
"""``[correct, examples]`` per task, or ``[correct, examples, correct_all]``."""
ROWS_CAP = 2
"""Test rows of one site that count, in medians of the others'."""
ALIKE = 1e-5
"""Relative difference of two updates below which they are the same model, rounding aside."""


@dataclass
class EvaluationReplies:
    """What an evaluation has brought so far.

    Attributes:
        counts: by client.
        withheld: clients that keep theirs to themselves.
        again: clients that were reached and have told nothing.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    again: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Asks for counts, and writes them into the history.

    Attributes:
        tasks: of the stream, in its order.
        learnt: number of a stage to the tasks that some client has worked on when it has ended.
    """

    exchange: Exchange
    tasks: tuple[str, ...]
    learnt: Callable[[int], tuple[str, ...]]

    def run(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Ask everybody; return the state as the clients decode it."""
        started = time.monotonic()
        shown = without_zeros(state)
        asked = self.request(step, shown)
        everyone = dict.fromkeys(self.exchange.roster.clients, asked)
        sent = self.exchange.ask(shown, asked, everyone)
        tally = EvaluationReplies()
        for reply in self.exchange.replies(step, sent):
            self.hear(step, reply, sent, tally)
        history = self.finish(step, sent, tally, history)
        history = history.after_round({"evaluation_bytes_down": sent.bytes_down})
        state = decoded(sent, shown, state)
        return state, history.after("evaluate", time.monotonic() - started)

    def request(self, step: Step, state: State) -> Instruction:
        """What every client is asked about the model that a step ends with."""
        common = self.exchange.instruction(step, state)
        return common.model_copy(update={"tasks": self.tasks, "learnt": self.learnt(step.stage)})

    def hear(self, step: Step, reply: Reply, sent: Dispatch, tally: EvaluationReplies) -> None:
        """Take the counts of a reply, to an evaluation request or to one that carries it."""
        instruction = sent.instructions[reply.client]
        try:
            counts = self._read(reply, instruction)
        except wire.ClientSkipped as reason:
            tally.withheld.add(reply.client)
            self.exchange.event("client_idle", step, client=reply.client, code=reason.code)
        except PayloadError as fault:
            silent = reply.message is None
            if silent and reply.client in sent.requests:
                tally.again.append(reply.client)
            if not (silent and instruction.task):  # told with the update that is missing
                self.exchange.event("client_failed", step, client=reply.client, reason=str(fault))
        else:
            if counts is None:
                tally.again.append(reply.client)
            else:
                tally.counts[reply.client] = counts

    def _read(self, reply: Reply, instruction: Instruction) -> Counts | None:
        message = answered(reply)
        experiment = self.exchange.experiment
        names = count_names(has_label_logits(experiment.model))
        read = wire.read_counts_beside if instruction.task else wire.read_counts
        return read(message, len(self.tasks), names, bool(experiment.data.generation))

    def finish(
        self, step: Step, sent: Dispatch, tally: EvaluationReplies, history: History
    ) -> History:
        """Return the history with the evaluation of the state that was ``sent``.

        A registered site that was sent the request and is silent is asked once more: until two
        heartbeats are missed the server takes a lost site for a connected one, and whoever is
        missing takes its tests along. Simulated clients cannot be lost. Nor do they claim rows that
        they do not have: counts of sites alone are :func:`cut`.

        Raises:
            UserError: fewer answered than the quorum.
        """
        roster = self.exchange.roster
        if tally.again and roster.patience:
            asked = self.request(step, sent.state)
            again = self.exchange.ask_again(sent, dict.fromkeys(tally.again, asked))
            sent.resent.extend(again.requests.values())
            for reply in self.exchange.replies(step, again):
                self.hear(step, reply, again, tally)
        heard = len(tally.counts) + len(tally.withheld)  # who keeps counts has answered, too
        self.exchange.require_quorum(heard, len(roster.clients), step)
        counts = {name: tally.counts[name] for name in roster.clients if name in tally.counts}
        if roster.patience:
            noised = self.exchange.experiment.privacy.metrics == "noised"
            first = {} if noised else first_told(history)  # noise is another one each time
            counts, found = cut(counts, first)
            for name, places in found.items():
                cut_tasks = [self.tasks[place] for place in places]
                self.exchange.event("counts_cut", step, client=name, tasks=cut_tasks)
        return self.recorded(step, counts, len(counts) < len(roster.clients), history)

    def recorded(
        self, step: Step, counts: dict[str, Counts], partial: bool, history: History
    ) -> History:
        """Return the history with the counts of an evaluation, and log what they say; ``partial``:
        some clients keep theirs, or were not there.

        Raises:
            UserError: no client has a test example of a task.
        """
        accuracy = pooled(counts, self.tasks, partial)
        among_all = pooled_among_all(counts, self.tasks)
        self.exchange.event("evaluated", step, accuracy=accuracy, class_incremental=among_all)
        return history.model_copy(update={"evaluations": (*history.evaluations, counts)})


def cut(
    counts: Mapping[str, Counts], first: Mapping[str, Sequence[float]]
) -> tuple[dict[str, Counts], dict[str, list[int]]]:
    """Return counts in which nobody's rows weigh more than its word can be trusted for, and whose
    were cut, in which tasks: of each task to as many rows as the client told ``first``, and, where
    three clients or more have some, to ``ROWS_CAP`` medians of the others'. The client's own
    accuracy stays; one large site among small ones counts as ``ROWS_CAP`` of them.

    Args:
        counts: of one evaluation, by client.
        first: client to its test rows of each task, as first told; who is missing has told none.
    """
    kept: dict[str, Counts] = {}
    found: dict[str, list[int]] = {}
    for name, rows in counts.items():
        kept[name] = []
        for place, row in enumerate(rows):
            others = [o[place][1] for other, o in counts.items() if other != name and o[place][1]]
            most = first[name][place] if name in first else math.inf
            if len(others) > 1:
                most = min(most, ROWS_CAP * median(others))
            kept[name].append(_shortened(row, most))
            if row[1] > most:
                found.setdefault(name, []).append(place)
    return kept, found


def _shortened(row: Sequence[int | float], most: float) -> list[int | float]:
    """Counts of as many rows, and right in as large a part; whole numbers stay whole."""
    if row[1] <= most:
        return list(row)
    rows = int(most)
    parts = [value * rows / row[1] for value in row]
    whole = all(isinstance(value, int) for value in row)
    return [round(part) if whole else part for part in parts]


def first_told(history: History) -> dict[str, list[float]]:
    """Return client to its test rows of each task when it first told any."""
    first: dict[str, list[float]] = {}
    for evaluation in history.evaluations:
        for name, rows in evaluation.items():
            first.setdefault(name, [row[1] for row in rows])
    return first


def pooled(
    counts: Mapping[str, Counts], tasks: Sequence[str], partial: bool = False
) -> dict[str, float]:
    """Return the accuracy per task over all clients' examples, 0 to 1; where they are ``partial``,
    of the tasks that some told.

    Raises:
        UserError: no client has a test example of a task.
    """
    accuracy = {}
    for j, task in enumerate(tasks):
        examples = sum(rows[j][1] for rows in counts.values())
        if examples == 0 and partial:
            continue
        if examples == 0:
            raise UserError(f"task '{task}' has no test example at any client; add some")
        accuracy[task] = sum(rows[j][0] for rows in counts.values()) / examples
    return accuracy


def pooled_among_all(counts: Mapping[str, Counts], tasks: Sequence[str]) -> dict[str, float]:
    """Return the same among all labels seen so far; of the tasks of which that was counted."""
    known = {}
    for j, task in enumerate(tasks):
        rows = [counts[client][j] for client in counts if len(counts[client][j]) > 2]
        examples = sum(row[1] for row in rows)
        if examples:
            known[task] = sum(row[2] for row in rows) / examples
    return known


def without_zeros(state: State) -> State:
    """Return the state, with one row in the place of a current adapter that changes nothing."""
    if is_nonzero(state.current):
        return state
    return replace(state, current=zero_adapter(state.current.shapes, 1))


def decoded(sent: Dispatch, shown: State, state: State) -> State:
    """Return the state as the clients decode it, of which ``shown`` was ``sent``."""
    return sent.state if shown is state else replace(sent.state, current=state.current)


def same_model(first: State, second: State) -> bool:
    """Whether two states answer alike, however they are laid out."""
    if first.heads.keys() != second.heads.keys():
        return False
    if any(not torch.equal(head, second.heads[task]) for task, head in first.heads.items()):
        return False
    return relative_difference(stack(first.parts()), stack(second.parts())) < ALIKE
