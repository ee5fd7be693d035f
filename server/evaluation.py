"""Evaluations: every client counts its own right answers, on every task, those to come included, or
on those that measures need."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from deal_core.aggregation.rule import NUMERICAL
from deal_core.errors import UserError
from deal_core.lora.adapter import is_nonzero, zero_adapter
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.methods import is_class_incremental
from deal_core.protection import sum_terms
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.messages import ProtocolError
from deal_core.secure_sum.server_round import ServerRound
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import EXAMPLES, count_names
from deal_core.wire.secure_layout import counts_layout
from server import wire
from server.clients import Clients, Sent, instruction_of
from server.measures import EVERYBODY, RIGHT_ALL, pooled
from server.plan import Step
from server.results import Counts, History
from server.secure_aggregation import SecureAggregation, Sums

ROWS_CAP = 2
"""Test rows of one site that count, in medians of the others'."""
ROUNDING = 1e-3
"""Of a sum of shares of right answers."""
NO_TASK = ""
"""In the place of a task: clients that keep their counts are not counted on again."""


@dataclass
class Evaluation:
    """One evaluation of the model that a step ends with."""

    clients: Clients
    step: Step
    stream: tuple[str, ...]
    """All tasks, in their order."""
    tasks: tuple[str, ...]
    """Those asked about, in the stream's order."""
    learnt: tuple[str, ...]
    """Those that some client has worked on when the stage of the step has ended."""
    counts: dict[str, Counts] = field(default_factory=dict)
    withheld: set[str] = field(default_factory=set)
    """Clients that keep theirs to themselves."""
    again: list[str] = field(default_factory=list)
    """Clients that were reached and have reported nothing."""
    started: float = field(default_factory=time.monotonic)
    sent: Sent | None = None
    """The requests; None where it was lost before it began."""

    def __post_init__(self) -> None:
        self._names = count_names(is_class_incremental(self.clients.experiment))
        data = self.clients.experiment.data
        self._shares = bool(data.generation or data.measures)

    def instruction(self, state: State) -> Instruction:
        """Return what every client is asked about a state."""
        common = instruction_of(self.step, state)
        return common.model_copy(update={"tasks": self.tasks, "learnt": self.learnt})

    def ask(self, state: State) -> None:
        """Make the requests, to all clients."""
        asked = dict.fromkeys(self.clients.roster.clients, self.instruction(state))
        self.sent = self.clients.ask(self.step, state, asked)

    def hear(self, reply: wire.Reply) -> None:
        """Take the counts of a reply."""
        client, sent = reply.client, self.sent
        try:
            message = reply.answered()
            counts = wire.read_counts(message, len(self.tasks), self._names, self._shares)
            self.counts[client] = self._over_the_stream(counts)
            self.clients.event("client_evaluated", self.step, client=client)
        except wire.ClientSkipped as reason:
            self.withheld.add(client)
            self.clients.event("client_idle", self.step, client=client, code=reason.code)
        except PayloadError as fault:
            if reply.message is None and sent is not None and client in sent.requests:
                self.again.append(client)
            self.clients.record_fault(client, self.step, fault)

    def finish(self, history: History) -> History:
        """Return the history with the evaluation.

        A registered site that was sent the request and is silent is asked once more: until two
        heartbeats are missed the server takes a lost site for a connected one, and its tests would
        be missing. Simulated clients cannot be lost. Nor do they claim rows that they do not have:
        counts of sites alone are :func:`cut`.

        Raises:
            UserError: fewer answered than the quorum.
        """
        sent = self.sent
        assert sent is not None
        clients, roster = self.clients, self.clients.roster
        if self.again and roster.patience:
            asked = self.instruction(sent.packed.state)
            again = clients.ask(self.step, sent.packed, dict.fromkeys(self.again, asked))
            for reply in clients.replies(again):
                self.hear(reply)
            sent.bytes += again.bytes
        heard = len(self.counts) + len(self.withheld)  # who keeps counts has answered, too
        clients.require_quorum(heard, len(roster.clients), self.step)
        counts = {name: self.counts[name] for name in roster.clients if name in self.counts}
        if roster.patience:
            first: dict[str, dict[int, float]] = {}
            for evaluation in history.evaluations:
                for name, rows in evaluation.items():
                    told = {place: row[1] for place, row in enumerate(rows) if row}
                    first[name] = told | first.get(name, {})
            counts, found = cut(counts, first)
            for name, places in found.items():
                tasks = [self.stream[place] for place in places]
                clients.event("counts_cut", self.step, client=name, tasks=tasks)
        return self._recorded(counts, len(counts) < len(roster.clients), history)

    def _over_the_stream(self, counts: Counts) -> Counts:
        """The counts of all tasks."""
        own = dict(zip(self.tasks, counts, strict=True))
        return [own.get(task, []) for task in self.stream]

    def _recorded(self, counts: dict[str, Counts], partial: bool, history: History) -> History:
        """The history with the counts; ``partial``: some clients keep theirs, or were not there."""
        accuracy = pooled(counts, self.stream)
        among_all = pooled(counts, self.stream, RIGHT_ALL)
        for task in self.tasks:
            if task not in accuracy and not partial:
                raise UserError(f"task '{task}' has no test example at any client; add some")
        self.clients.event("evaluated", self.step, accuracy=accuracy, class_incremental=among_all)
        return history.model_copy(update={"evaluations": (*history.evaluations, counts)})


@dataclass
class MaskedEvaluation(Evaluation):
    """An evaluation whose counts are only seen as one sum over clients. A sum that fails leaves the
    evaluation without counts, and the run continues."""

    secure: SecureAggregation = field(kw_only=True)
    _held: ServerRound = field(init=False)
    _layout: Layout = field(init=False)

    def ask(self, state: State) -> None:
        """Make the requests, to the members of a secure sum, unless there are too few.

        Raises:
            UserError: fewer prepared than the quorum.
        """
        experiment, asked = self.clients.experiment, self.instruction(state)
        basis = sum_terms(experiment, experiment.model.name, asked, state)
        sites = experiment.federation.clients
        self._layout = counts_layout(self._names, len(self.tasks), sites, basis)
        everyone = dict.fromkeys(self.clients.roster.clients, NO_TASK)
        with self.clients.may_be_lost("evaluation_lost", self.step):
            self._held = self.secure.share_keys(self.step, everyone, self._layout, by_all=True)
            own = self.secure.masked_input_requests(self._held)
            self.sent = self.clients.ask(self.step, state, dict.fromkeys(own, asked), secure=own)

    def hear(self, reply: wire.Reply) -> None:
        """Take a client's masked counts, if it gives any."""
        client = reply.client
        try:
            data = wire.read_secure(reply.answered())
            self._held = self.secure.add_masked_input(self._held, client, data)
            self.clients.event("client_evaluated", self.step, client=client)
        except wire.ClientSkipped as reason:
            self.secure.sits_out(self.step, client, NO_TASK, reason)
        except NUMERICAL as fault:
            self.clients.record_fault(client, self.step, fault)
            self.secure.note_blame(self.step, self._held, client, reply.message, NO_TASK)

    def finish(self, history: History) -> History:
        """Return the history with the sum over clients."""
        counts: dict[str, Counts] = {}
        if self.sent is not None:
            with self.clients.may_be_lost("evaluation_lost", self.step):
                words = self.secure.unmask(self.step, self._held)
                sums = self._layout.decode(words, len(self._held.masked))
                rows = summed_rows(sums, self._names, self._shares)
                counts[EVERYBODY] = self._over_the_stream(rows)
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
    counts: Mapping[str, Counts], first: Mapping[str, Mapping[int, float]]
) -> tuple[dict[str, Counts], dict[str, list[int]]]:
    """Return counts in which no client claims more rows than can be trusted, and which were cut, in
    which tasks: of each task to as many rows as the client reported ``first``, and, where three
    clients or more have some, to ``ROWS_CAP`` medians of the others'. The client's own accuracy
    stays; one large site among small ones counts as ``ROWS_CAP`` of them."""
    kept: dict[str, Counts] = {}
    found: dict[str, list[int]] = {}
    for name, rows in counts.items():
        kept[name] = [list(row) for row in rows]
        for place, row in enumerate(rows):
            if not row:
                continue
            others = [o[place][1] for other, o in counts.items() if other != name and o[place][1]]
            most = first.get(name, {}).get(place, math.inf)
            if len(others) > 1:
                most = min(most, ROWS_CAP * median(others))
            if row[1] > most:
                parts = [value * int(most) / row[1] for value in row]
                whole = all(isinstance(value, int) for value in row)
                kept[name][place] = [round(part) if whole else part for part in parts]
                found.setdefault(name, []).append(place)
    return kept, found


def found_worse(clients: Clients, step: Step, state: State, tasks: Sequence[str]) -> bool:
    """Return whether half or more of the clients that answer, two at least, say that their own
    records are answered better without the heads of ``state``; ``tasks``: whose class means are new
    in it. A site that lies in the sum votes, too: a tie is against the means."""
    common = instruction_of(step, state)
    asked = common.model_copy(update={"tasks": tuple(tasks), "server_round": 0})
    sent = clients.ask(step, state, dict.fromkeys(clients.roster.clients, asked))
    worse: dict[str, bool] = {}
    for reply in clients.replies(sent):
        try:
            worse[reply.client] = wire.read_verdict(reply.answered())
        except wire.ClientSkipped:
            continue
        except NUMERICAL as fault:
            clients.record_fault(reply.client, step, fault)
    against = sum(worse.values())
    if against:
        clients.event("class_means_doubted", step, tasks=list(tasks), by=against, of=len(worse))
    return against > 1 and 2 * against >= len(worse)


def without_zeros(state: State) -> State:
    """Return the state, with one row in the place of a current adapter that changes nothing."""
    if is_nonzero(state.current):
        return state
    return replace(state, current=zero_adapter(state.current.shapes, 1))
