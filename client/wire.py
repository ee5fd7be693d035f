"""Flower records to the project's own types and back, with the checks of the client's side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from client.distilled_store import DistilledStore
from client.egress import IN_THE_SUM, METRICS
from client.resources import Workbench
from client.status_reply import STATUS
from deal_core.config.experiment import counts_in_sum
from deal_core.lora.adapter import Adapter, padded, zero_adapter
from deal_core.lora.payload import (
    COUNTS,
    DISTILLED,
    HEADS,
    LORA,
    RESIDUAL,
    WORSE,
    PayloadError,
    Template,
)
from deal_core.lora.state import State
from deal_core.privacy.interface import Counts, LocalUpdate
from deal_core.wire.adapter_record import BOTH, decode_checked, require_bounded, unpack
from deal_core.wire.heads import read_heads, tasks_in
from deal_core.wire.instruction import RECORD, Instruction, read_instruction
from deal_core.wire.records import REPLY, SECURE, record_digest


def read_request(
    message: Message, bench: Workbench, store: DistilledStore
) -> tuple[State, Instruction]:
    """Check and decode a server's request.

    Args:
        message: the request.
        bench: what adapters must fit.
        store: has the retained adapter that the client was sent last.

    Returns:
        The server's state as the request brings it, and what is asked.

    Raises:
        PayloadError: a record too many or too few, or anything in one that is not expected.
        DistilledMissing: the request relies on a retained adapter that is not in the store.
    """
    content = message.content
    if RECORD not in content.config_records:
        raise PayloadError("no instruction")
    instruction = read_instruction(dict(content.config_records[RECORD]))
    bench.phase(instruction.phase)
    in_sum = counts_in_sum(bench.experiment)
    masked = bench.masked(instruction.phase) if instruction.task else in_sum
    others = {RECORD, SECURE} if masked else {RECORD}
    arrays = dict(content.array_records)
    wanted = {LORA, RESIDUAL} if instruction.residual_rank else {LORA}
    if HEADS in arrays and bench.statistics is not None:
        wanted.add(HEADS)
    if set(content) != {*arrays, *others} or set(arrays) - {DISTILLED} != wanted:
        raise PayloadError(f"records {sorted(content)}, expected {sorted({*wanted, *others})}")
    sent = arrays.get(DISTILLED)
    if sent is None:
        arrays[DISTILLED] = store.load(instruction.distilled)
    elif record_digest(sent) != instruction.distilled:
        raise PayloadError("distilled: not what the instruction names")
    basis = instruction.distilled, instruction.distilled_rank, *_ranks(instruction)
    raw = [_raw(arrays[name]) for name in sorted(wanted)]

    def decode() -> State:
        return _state(arrays, bench, instruction)

    state: State = bench.latest.get_or_compute("state", (basis, raw), decode)
    if sent is not None:
        store.save(sent)
    return state, instruction


def _ranks(instruction: Instruction) -> tuple[int, ...]:
    return (
        instruction.rank,
        instruction.retained_rank,
        instruction.residual_rank,
        instruction.num_reference_directions,
    )


def request_name(message: Message, instruction: Instruction, run: str) -> str:
    """Return a name for all that is asked: equal only for what is the same to the byte, in one run.

    Args:
        message: carries the adapters.
        instruction: the message's, or that of an evaluation which it carries along: asked for
            alone, it has the same name.
        run: of whose run it is: other settings make another answer.
    """
    hashed = hashlib.blake2b(digest_size=32)
    hashed.update(json.dumps(run).encode())
    hashed.update(json.dumps(instruction.to_config(), sort_keys=True).encode())
    for name, record in sorted(message.content.array_records.items()):
        if name != DISTILLED:  # the instruction names it
            hashed.update(f"{name} {record_digest(record)} ".encode())
    return hashed.hexdigest()


def _raw(record: ArrayRecord) -> dict[str, tuple[object, ...]]:
    """All there is of a record."""
    return {key: (a.dtype, a.shape, a.stype, a.data) for key, a in record.items()}


def _state(arrays: Mapping[str, ArrayRecord], bench: Workbench, instruction: Instruction) -> State:
    scaling = bench.experiment.adapter.lora_alpha / instruction.rank
    current = _adapter(arrays[LORA], bench, instruction.rank, scaling)
    _require_room(instruction, bench)
    distilled = _adapter(arrays[DISTILLED], bench, instruction.distilled_rank, 1.0)
    retained, residual = padded(distilled, instruction.retained_rank), None
    if instruction.residual_rank:
        residual = _adapter(arrays[RESIDUAL], bench, instruction.residual_rank, 1.0)
    heads = _heads(arrays[HEADS], bench) if HEADS in arrays else {}
    return State(current, retained, residual, instruction.num_reference_directions, heads)


def _require_room(instruction: Instruction, bench: Workbench) -> None:
    """Rows that are not sent cost the sender nothing: there are no more than a run has.

    Raises:
        PayloadError: there are.
    """
    adapter = bench.experiment.adapter
    most = max(2 * adapter.retained_rank + adapter.rank, instruction.distilled_rank)
    if instruction.retained_rank > most:
        raise PayloadError(f"instruction: more than {most} retained rows")


def _heads(record: ArrayRecord, bench: Workbench) -> dict[str, Tensor]:
    """Label heads of tasks of the run, and of no others."""
    statistics = bench.statistics
    if statistics is None:
        raise PayloadError("heads: no method of this run has any")
    rounded = statistics.rounds(bench.experiment.wire.dtype)
    tasks = tasks_in(record, rounded)
    if not set(tasks) <= set(bench.tasks):
        raise PayloadError("heads: a task that is not of this run")
    size = statistics.size(bench.experiment.model)
    shapes = {task: (len(bench.labels(task)), size + 1) for task in tasks}
    return read_heads(record, shapes, rounded)


def _adapter(record: ArrayRecord, bench: Workbench, rank: int, scaling: float) -> Adapter:
    dtype = bench.experiment.wire.dtype
    arrays = decode_checked(record, dtype, Template(bench.shapes, rank), BOTH)
    adapter = unpack(arrays, dtype, zero_adapter(bench.shapes, rank, scaling))
    require_bounded(adapter)
    return adapter


def update_reply(
    message: Message,
    update: LocalUpdate,
    instruction: Instruction,
    counted: tuple[str, Counts] | None = None,
) -> Message:
    """Return the reply with a local update: the trained factors, which request it answers, its
    figures; and, where they were asked for, a code and the counts of the model that arrived."""
    arrays = {key: Array(np.ascontiguousarray(value)) for key, value in update.arrays.items()}
    return _reply(message, {LORA: ArrayRecord(arrays)}, update.figures, instruction, counted)


def secure_update_reply(
    message: Message,
    figures: Mapping[str, float],
    instruction: Instruction,
    counted: tuple[str, Counts] | None,
    masked: bytes,
) -> Message:
    """Return the same with a masked vector in the place of the update; of its figures those that
    tell nothing of single records."""
    told = {name: value for name, value in figures.items() if name not in IN_THE_SUM}
    content = {SECURE: ConfigRecord({REPLY: masked})}
    return _reply(message, content, {**told, "num_examples": 1.0}, instruction, counted)


def _reply(
    message: Message,
    records: Mapping[str, ArrayRecord | ConfigRecord],
    figures: Mapping[str, float],
    instruction: Instruction,
    counted: tuple[str, Counts] | None,
) -> Message:
    """The reply to a training request: what it answers, records, figures, and counts."""
    status = ConfigRecord(
        {
            "code": "ok",
            "stage": instruction.stage,
            "phase": instruction.phase,
            "server_round": instruction.server_round,
        }
    )
    content = RecordDict({STATUS: status, **records, METRICS: MetricRecord(dict(figures))})
    if counted is not None:
        code, counts = counted
        told = {name: list(values) for name, values in counts.items()}
        content[COUNTS] = ConfigRecord({"code": code, **told})
    return Message(content, reply_to=message)


def evaluation_reply(message: Message, counts: Counts) -> Message:
    """Counts per task, in the order of the request."""
    metrics = MetricRecord({name: list(values) for name, values in counts.items()})
    content = RecordDict({STATUS: ConfigRecord({"code": "ok"}), METRICS: metrics})
    return Message(content, reply_to=message)


def verdict_reply(message: Message, worse: bool) -> Message:
    """Return the reply with what a site thinks of class means."""
    metrics = MetricRecord({WORSE: int(worse)})
    content = RecordDict({STATUS: ConfigRecord({"code": "ok"}), METRICS: metrics})
    return Message(content, reply_to=message)
