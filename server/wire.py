"""Messages to clients, and their replies: sent, collected, and read, with the server's checks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from deal_core.aggregation.rule import AggregationFailed, require_finite
from deal_core.config.experiment import Experiment
from deal_core.deal.interface import statistics_of
from deal_core.installed import package_digest
from deal_core.lora import payload
from deal_core.lora.adapter import nonzero_rank, padded, split
from deal_core.lora.state import State, to_arrays
from deal_core.methods import method_of
from deal_core.randomness import seeded
from deal_core.secure_sum.messages import ProtocolError, UsedUpdate
from deal_core.wire import tensors
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import BLAMES, EXAMPLES, REPLY, SECURE, record_digest
from server.results import Spending, spending_in

F = TypeVar("F")
PLACE = ("stage", "phase", "server_round")
BY_POLICY = "policy"
NO_PART = frozenset({"no-data", "budget-spent", BY_POLICY, UsedUpdate.code})
NO_COUNTS = frozenset({"withheld", BY_POLICY})
"""Codes by which a client takes no part in a round, or an evaluation: not a fault."""
LACKS_RETAINED = "resend"
HAS_RETAINED = frozenset({"ok"}) | NO_PART | NO_COUNTS
"""What the code of a reply tells of the retained adapter, which is sent once."""
LATE, ABSENT = "no reply before the deadline", "not connected"
FLOWER_ERRORS = {
    1: "its app could not be loaded",
    2: "its app raised an error, which its own log has",
    3: "the request was not fetched in time",
    4: "the reply came too late",
    5: ABSENT,
    8: "its process ended or hung",
}
"""Codes of Flower's errors, in words."""
POLL_SECONDS = 0.2
OPTIONAL = frozenset({"loss", "seconds"}) | Spending.model_fields.keys()
"""Figures that a client may keep to itself, or does not have."""


class ClientSkipped(Exception):
    """The client takes no part: it has no data, no budget, or rules against it. Not a fault."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Reply:
    """One client's answer: a message, or the reason why there is none."""

    client: str
    message: Message | None
    fault: str = ""

    def answered(self) -> Message:
        """Return the message, or raise a PayloadError with the reason why there is none."""
        if self.message is None:
            raise payload.PayloadError(self.fault)
        return self.message


def push(grid: Grid, requests: Mapping[str, Message]) -> dict[str, str]:
    """Send requests, client name to message; return message id to client, of those sent."""
    sent = list(grid.push_messages(list(requests.values()))) if requests else []
    return {number: name for name, number in zip(requests, sent, strict=True) if number}


def pull(grid: Grid, ids: Collection[str], deadline_seconds: float) -> Iterator[Message]:
    """Yield each message as it arrives, until every id is answered; some may be added meanwhile.

    The deadline ends the wait for those that are silent. What is there when the server looks is
    taken: a machine that was suspended, or computes all clients itself, loses no client by it.
    """
    answered, end, quiet = set[str](), time.monotonic() + deadline_seconds, False
    while waiting := [each for each in ids if each not in answered]:
        silent = True
        for message in grid.pull_messages(waiting):
            number = message.metadata.reply_to_message_id
            if number in waiting and number not in answered:  # a further reply does not count
                silent = False
                answered.add(number)
            yield message
        if silent and quiet and time.monotonic() >= end:
            break
        quiet = silent
        if silent:
            time.sleep(POLL_SECONDS)


def matched(
    ids: dict[str, str],
    messages: Iterable[Message],
    drop: Callable[[str], object] = lambda client: None,
    again: Callable[[str, Message], Mapping[str, str]] = lambda client, message: {},
) -> Iterator[Reply]:
    """Yield the replies in ``messages`` to the requests of these ids, exactly one per client: the
    silent come last, with a fault. A reply to a request of an earlier round is not seen at all.

    Args:
        ids: of messages that are on their way, to the client.
        messages: as they arrive.
        drop: hears of the client of a reply beyond that.
        again: from a client and its reply to the id of another request, whose reply counts; empty:
            this one counts.
    """
    waiting = dict.fromkeys(ids.values())
    for message in messages:
        client = ids.get(message.metadata.reply_to_message_id)
        if client is not None and client not in waiting:
            drop(client)
        elif client is not None and (more := again(client, message)):
            ids.update(more)
        elif client is not None:
            del waiting[client]
            failed, fault = message.has_error(), ""
            if failed:
                code = message.error.code
                fault = f"{FLOWER_ERRORS.get(code, 'no answer')} (flower error {code})"
            yield Reply(client, None if failed else message, fault)
    for client in waiting:
        yield Reply(client, None, LATE)


def collect(
    grid: Grid, requests: Mapping[str, Message], deadline_seconds: float
) -> Iterator[Reply]:
    """Send requests, and yield the replies as they arrive: see :func:`pull` and :func:`matched`."""
    ids = push(grid, requests)
    for name in requests.keys() - set(ids.values()):  # the node is gone since it was looked up
        yield Reply(name, None, ABSENT)
    yield from matched(ids, pull(grid, ids, deadline_seconds))


@dataclass(frozen=True)
class Outgoing:
    """A state on its way to the clients.

    Attributes:
        records: what travels.
        state: as the clients decode it; after a lossy format the server goes on from this.
        kind: Flower's type of the messages that carry it.
        retained_rank: rows of the record of the retained adapter; its others are 0.
        digest: of that record.
        smaller: rank to the same, for clients whose own adapter has a smaller one.
    """

    records: dict[str, ArrayRecord]
    state: State
    kind: str
    retained_rank: int
    digest: str
    smaller: Mapping[int, Outgoing] = field(default_factory=dict)

    def of(self, rank: int) -> Outgoing:
        """Return what a client of this rank is sent."""
        return self.smaller.get(rank, self)


def packed(
    experiment: Experiment, state: State, asked: Instruction, ranks: Set[int] = frozenset()
) -> Outgoing:
    """Return a state packed for what is asked of it, and for each of the clients' own ``ranks``;
    formats that round draw by what is asked. Rows of the retained adapter that are zero do not
    travel."""
    dtype, rank, heads = experiment.wire.dtype, nonzero_rank(state.retained), state.heads
    kind = MessageType.TRAIN if asked.task else MessageType.EVALUATE  # which is of no one task
    where = (experiment.run.seed, "downlink", kind, asked.stage, asked.server_round)
    generator = seeded(*where)
    sent = {payload.LORA: state.current, payload.RETAINED: split(state.retained, rank)[0]}
    if state.residual is not None:
        sent[payload.RESIDUAL] = state.residual
    records = {
        name: as_record(tensors.encode(dtype, to_arrays(each), generator))
        for name, each in sent.items()
    }
    arrived = {name: tensors.unpack(record, dtype, sent[name]) for name, record in records.items()}
    if heads:
        statistics = statistics_of(method_of(experiment))
        rounded = statistics is not None and statistics.rounds(dtype)
        records[payload.HEADS] = as_record(tensors.pack_heads(heads, rounded))
        shapes = {task: (head.shape[0], head.shape[1]) for task, head in heads.items()}
        heads = tensors.read_heads(records[payload.HEADS], shapes, rounded) if rounded else heads
    decoded = replace(
        state,
        heads=heads,
        current=arrived[payload.LORA],
        retained=padded(arrived[payload.RETAINED], state.retained.rank),
        residual=arrived.get(payload.RESIDUAL),
    )
    digest = record_digest(records[payload.RETAINED])
    full, smaller = Outgoing(records, decoded, kind, rank, digest), dict[int, Outgoing]()
    for own_rank in ranks - {state.current.rank}:
        scaling = experiment.adapter.lora_alpha / own_rank
        # Under flora, lora_B is zero at the start of a round: nothing is lost with the other rows.
        current = replace(split(decoded.current, own_rank)[0], scaling=scaling)
        record = as_record(tensors.encode(dtype, to_arrays(current), seeded(*where)))
        own = replace(decoded, current=tensors.unpack(record, dtype, current))
        smaller[own_rank] = replace(full, records={**records, payload.LORA: record}, state=own)
    return replace(full, smaller=smaller)


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
            tensors.require_bounded(adapter)
    return state


def read_figures(
    message: Message, instruction: Instruction, name: str
) -> tuple[dict[str, float], Spending | None]:
    """Return the figures beside what answers a training request, in the record ``name``, and what
    they say of privacy.

    Raises:
        PayloadError: an error code, another record, a wrong round, or figures that cannot be.
        ClientSkipped: the client takes no part.
    """
    content = _content(message, NO_PART, {"status", name, "metrics"})
    answered = _fields(content.config_records, "status", {"code", *PLACE})
    for key in PLACE:
        if answered[key] != getattr(instruction, key):
            raise payload.PayloadError(f"answers another {key}")
    figures = _fields(content.metric_records, "metrics", {"num_examples"}, OPTIONAL)
    measured: dict[str, float] = {}
    for key, value in figures.items():
        if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise payload.PayloadError("a figure is no number or not finite")
        measured[key] = float(value)
    if not 1 <= measured["num_examples"] <= payload.MOST_EXAMPLES:
        raise payload.PayloadError("num_examples out of bounds")
    try:
        return measured, spending_in(measured)
    except ValueError as fault:
        raise payload.PayloadError("what privacy has cost cannot be") from fault


def read_secure(message: Message, idle: Set[str] = frozenset()) -> bytes:
    """Return a site's reply of a secure sum.

    Raises:
        ClientSkipped: it takes no part, also by further codes, ``idle``.
        PayloadError: it is none.
    """
    content = _content(message, NO_PART | NO_COUNTS | idle)
    reply = _fields(content.config_records, SECURE, {REPLY})[REPLY]
    if not isinstance(reply, bytes):
        raise payload.PayloadError("secure: no bytes")
    return reply


def read_counts(
    message: Message, tasks: int, names: Sequence[str], shares: bool = False
) -> list[list[int | float]]:
    """Return the counts of ``names`` (:func:`~deal_core.wire.records.count_names`) per task, in the
    order of the request; ``shares``: answers may be right in part, because some are texts.

    Raises:
        PayloadError: an error code, or counts that cannot be.
        ClientSkipped: the client keeps them to itself.
    """
    content = _content(message, NO_COUNTS, {"status", "metrics"})
    _fields(content.config_records, "status", {"code"})
    figures: Mapping[str, object] = _fields(content.metric_records, "metrics", set(names))
    columns: list[list[int | float]] = []
    for name in names:
        values, kinds = figures[name], {int, float} if shares and name != EXAMPLES else {int}
        if not (
            isinstance(values, list) and len(values) == tasks and set(map(type, values)) <= kinds
        ):
            raise payload.PayloadError("counts are not one number per task")
        columns.append(values)
    rows = [list(row) for row in zip(*columns, strict=True)]
    for row in rows:
        examples = row[names.index(EXAMPLES)]
        if any(not 0 <= count <= examples <= payload.MOST_EXAMPLES for count in row):
            raise payload.PayloadError("counts out of bounds")
    return rows


def read_verdict(message: Message) -> bool:
    """Return whether a client's answers are worse with class means; or raise, as above."""
    content = _content(message, NO_COUNTS, {"status", "metrics"})
    _fields(content.config_records, "status", {"code"})
    worse = _fields(content.metric_records, "metrics", {payload.WORSE})[payload.WORSE]
    if isinstance(worse, bool) or worse not in (0, 1):
        raise payload.PayloadError("worse: no bit")
    return bool(worse)


def status(message: Message) -> str:
    """Return the code that a reply carries, or raise a PayloadError: it carries nothing."""
    if not message.has_content():
        raise payload.PayloadError("an empty reply")
    if "status" not in message.content.config_records:
        return ""
    return str(message.content.config_records["status"].get("code", ""))


def blamed(message: Message | None) -> bytes:
    """Return the site whose message of a secure sum a client refuses; empty: none."""
    if message is None or not message.has_content() or status(message) != ProtocolError.code:
        return b""
    told = message.content.config_records["status"].get(BLAMES)
    try:
        return bytes.fromhex(told) if isinstance(told, str) else b""
    except ValueError:
        return b""


def _content(message: Message, idle: Set[str], names: Set[str] | None = None) -> RecordDict:
    """Return the records of a reply that reports success: these ``names``, and no others.

    Raises:
        ClientSkipped: a code of ``idle``, by which the client takes no part.
        PayloadError: any other code, or record.
    """
    code = status(message)
    if code in idle:
        raise ClientSkipped(code)
    if code == "version":
        raise payload.PayloadError(
            "the client has another federated-deal installed than the server "
            f"({package_digest()[:12]}); install the same release at both"
        )
    if code != "ok":
        raise payload.PayloadError(f"client reports {code[:40]!r}")
    if names is not None and set(message.content) != names:
        raise payload.PayloadError(f"records other than {', '.join(sorted(names))}")
    return message.content


def _fields(
    records: Mapping[str, Mapping[str, F]],
    name: str,
    fields: set[str],
    optional: frozenset[str] = frozenset(),
) -> Mapping[str, F]:
    """A record with these fields and no others: a spare one could carry anything."""
    if name not in records:
        raise payload.PayloadError("a record of another kind than expected")
    if set(records[name]) - optional != fields:
        raise payload.PayloadError(f"{name}: fields other than {', '.join(sorted(fields))}")
    return records[name]


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message: what a round costs on the wire, framing aside."""
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())


def as_record(encoded: tensors.WireArrays) -> ArrayRecord:
    """Flower's record of what a codec made."""
    return ArrayRecord({key: Array(np.ascontiguousarray(a)) for key, a in encoded.items()})
