"""Evaluations: every client counts its own right answers on every task, those to come included.

The model that a stage ends with is the model that the next one begins with. So where a message has
a price, which is at sites, the first training request of a stage carries the evaluation of the one
before along, and clients that do not train in that round are asked in the same breath.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
import torch

from deal_core.aggregation import NUMERICAL
from deal_core.errors import UserError
from deal_core.lora.adapter import is_nonzero, relative_difference, stack, zero_adapter
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.models import has_label_logits
from deal_core.protection import sum_terms
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.messages import ProtocolError
from deal_core.secure_sum.server_round import ServerRound
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import EXAMPLES, count_names
from deal_core.wire.secure_layout import counts_layout
from server import wire
from server.checkpoint import EVERYBODY, History
from server.clients import Clients, Reply, Sent, instruction_of
from server.plan import Step
from server.secure_aggregation import SecureAggregation, Sums

Counts = list[list[int | float]]
"""``[correct, examples]`` per task, or ``[correct, examples, correct_all]``."""
ROWS_CAP = 2
"""Test rows of one site that count, in medians of the others'."""
ALIKE = 1e-5
"""Relative difference of two updates below which they are the same model, rounding aside."""


ROUNDING = 1e-3
"""Of a sum of shares of right answers."""
NO_TASK = ""
"""In the place of a task: clients that keep their counts are not counted on again."""


@dataclass
class Evaluation:
    """One evaluation of the model that a step ends with.

    Attributes:
        clients: of the run.
        step: whose model it is.
        tasks: of the stream, in its order.
        learnt: those that some client has worked on when the stage of the step has ended.
        counts: what has been told so far, by client.
        withheld: clients that keep theirs to themselves.
        again: clients that were reached and have told nothing.
    """

    clients: Clients
    step: Step
    tasks: tuple[str, ...]
    learnt: tuple[str, ...]
    counts: dict[str, Counts] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    again: list[str] = field(default_factory=list)

    def instruction(self, state: State) -> Instruction:
        """Return what every client is asked about a state."""
        common = instruction_of(self.step, state)
        return common.model_copy(update={"tasks": self.tasks, "learnt": self.learnt})

    def ask(self, state: State) -> Sent | None:
        """Return requests to all clients; None: it is lost before it begins."""
        asked = self.instruction(state)
        return self.clients.ask(self.step, state, dict.fromkeys(self.clients.roster.clients, asked))

    def beside(self, state: State, requests: Mapping[str, Instruction]) -> dict[str, Instruction]:
        """Return instructions by which all are asked for counts of a state as well: who trains the
        model as it is, beside that; the others alone. ``requests``: of the clients that train."""
        counting = self.instruction(state)
        asked = dict.fromkeys(self.clients.roster.clients, counting)
        beside = {"piggybacked_evaluation": counting.tasks, "learnt": counting.learnt}
        for name, each in requests.items():
            whole = each.rank == counting.rank
            asked[name] = each.model_copy(update=beside if whole else {})
        return asked

    @property
    def names(self) -> tuple[str, ...]:
        """Of the counts of a task."""
        return count_names(has_label_logits(self.clients.experiment.model))

    def hear(self, reply: Reply, sent: Sent) -> None:
        """Take the counts of a reply, to an evaluation request or to one that carries it."""
        client, instruction = reply.client, sent.instructions[reply.client]
        read = wire.read_counts_beside if instruction.task else wire.read_counts
        shares = bool(self.clients.experiment.data.generation)
        try:
            counts = read(reply.answered(), len(self.tasks), self.names, shares)
        except wire.ClientSkipped as reason:
            self.withheld.add(client)
            self.clients.event("client_idle", self.step, client=client, code=reason.code)
        except PayloadError as fault:
            silent = reply.message is None
            if silent and client in sent.requests:
                self.again.append(client)
            if not (silent and instruction.task):  # told with the update that is missing
                self.clients.event("client_failed", self.step, client=client, reason=str(fault))
        else:
            if counts is None:
                self.again.append(client)
            else:
                self.counts[client] = counts

    def finish(self, sent: Sent | None, history: History) -> History:
        """Return the history with the evaluation of the state that was ``sent``.

        A registered site that was sent the request and is silent is asked once more: until two
        heartbeats are missed the server takes a lost site for a connected one, and its tests would
        be missing. Simulated clients cannot be lost. Nor do they claim rows that they do not have:
        counts of sites alone are :func:`cut`.

        Raises:
            UserError: fewer answered than the quorum.
        """
        assert sent is not None
        clients, roster = self.clients, self.clients.roster
        if self.again and roster.patience:
            asked = self.instruction(sent.packed.state)
            again = clients.ask_again(self.step, sent, dict.fromkeys(self.again, asked))
            sent.resent.extend(again.requests.values())
            for reply in clients.replies(again):
                self.hear(reply, again)
        heard = len(self.counts) + len(self.withheld)  # who keeps counts has answered, too
        clients.require_quorum(heard, len(roster.clients), self.step)
        counts = {name: self.counts[name] for name in roster.clients if name in self.counts}
        if roster.patience:
            noised = clients.experiment.privacy.metrics == "noised"
            first = {} if noised else first_told(history)  # noise is another one each time
            counts, found = cut(counts, first)
            for name, places in found.items():
                cut_tasks = [self.tasks[place] for place in places]
                clients.event("counts_cut", self.step, client=name, tasks=cut_tasks)
        return self._recorded(counts, len(counts) < len(roster.clients), history)

    def _recorded(self, counts: dict[str, Counts], partial: bool, history: History) -> History:
        """The history with the counts; ``partial``: some clients keep theirs, or were not there."""
        accuracy = pooled(counts, self.tasks, partial)
        among_all = pooled_among_all(counts, self.tasks)
        self.clients.event("evaluated", self.step, accuracy=accuracy, class_incremental=among_all)
        return history.model_copy(update={"evaluations": (*history.evaluations, counts)})


@dataclass
class MaskedEvaluation(Evaluation):
    """An evaluation whose counts are only seen as one sum over clients. A sum that fails leaves the
    evaluation without counts, and the run continues.

    Attributes:
        secure: the secure sums of the run.
    """

    secure: SecureAggregation = field(kw_only=True)
    _held: ServerRound = field(init=False)
    _layout: Layout = field(init=False)

    def ask(self, state: State) -> Sent | None:
        """Return requests to the members of a secure sum; None: there are too few.

        Raises:
            UserError: fewer prepared than the quorum.
        """
        experiment, asked = self.clients.experiment, self.instruction(state)
        basis = sum_terms(experiment, experiment.model.name, asked, state)
        sites = experiment.federation.clients
        self._layout = counts_layout(self.names, len(self.tasks), sites, basis)
        everyone = dict.fromkeys(self.clients.roster.clients, NO_TASK)
        with self.clients.may_be_lost("evaluation_lost", self.step):
            self._held = self.secure.share_keys(self.step, everyone, self._layout, by_all=True)
            own = self.secure.masked_input_requests(self._held)
            return self.clients.ask(self.step, state, dict.fromkeys(own, asked), secure=own)
        return None

    def hear(self, reply: Reply, sent: Sent) -> None:
        """Take a client's masked counts, if it gives any."""
        client = reply.client
        try:
            self._held = self.secure.add_masked_input(self._held, client, reply.answered())
        except wire.ClientSkipped as reason:
            self.secure.sits_out(self.step, client, NO_TASK, reason)
        except NUMERICAL as fault:
            self.clients.record_fault(client, self.step, fault)
            self.secure.note_blame(self.step, self._held, client, reply.message, NO_TASK)

    def finish(self, sent: Sent | None, history: History) -> History:
        """Return the history with the sum over clients.

        Raises:
            UserError: two sites are one.
        """
        counts: dict[str, Counts] = {}
        if sent is not None:
            with self.clients.may_be_lost("evaluation_lost", self.step):
                words = self.secure.unmask(self.step, self._held)
                sums = self._layout.decode(words, len(self._held.masked))
                shares = bool(self.clients.experiment.data.generation)
                counts[EVERYBODY] = summed_rows(sums, self.names, shares)
        return self._recorded(counts, True, history)


def summed_rows(sums: Sums, names: tuple[str, ...], shares: bool) -> Counts:
    """Return the counts of each task; whole numbers unless answers may be right in part.

    Raises:
        ProtocolError: counts that cannot be, which one site's can make of the sum.
    """
    columns = [sums[name] if shares else np.rint(sums[name]) for name in names]
    rows = [[float(x) if shares else int(x) for x in row] for row in zip(*columns, strict=True)]
    for row in rows:
        examples = row[names.index(EXAMPLES)]
        if any(not 0 <= count <= examples + ROUNDING for count in row):
            raise ProtocolError("a sum of counts that cannot be: some site's are false")
    return rows


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


def decoded(sent: Sent, state: State) -> State:
    """Return a state that was ``sent`` (:func:`without_zeros`) as the clients decode it."""
    arrived = sent.packed.state
    return arrived if is_nonzero(state.current) else replace(arrived, current=state.current)


def same_model(first: State, second: State) -> bool:
    """Whether two states answer alike, however they are laid out."""
    if first.heads.keys() != second.heads.keys():
        return False
    if any(not torch.equal(head, second.heads[task]) for task, head in first.heads.items()):
        return False
    return relative_difference(stack(first.parts()), stack(second.parts())) < ALIKE
