"""Flower records to the project's own types and back, with the checks of the client's side."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from client.resources import Workbench
from client.status_reply import STATUS
from deal_core.lora.adapter import Adapter, split, zero_adapter
from deal_core.lora.payload import COUNTS, DISTILLED, HEADS, LORA, PayloadError, Template
from deal_core.lora.state import State
from deal_core.privacy.interface import Counts, LocalUpdate
from deal_core.wire.adapter_record import BOTH, decode_checked, require_bounded, unpack
from deal_core.wire.instruction import RECORD, Instruction, read_instruction
from deal_core.wire.sums import read_heads

METRICS = "metrics"


def read_request(message: Message, bench: Workbench) -> tuple[State, Instruction]:
    """Check and decode a server's request.

    Raises:
        PayloadError: a record too many or too few, or anything in one that is not expected.
    """
    content = message.content
    carried = {HEADS} if HEADS in content and bench.uses_heads else set()
    if set(content) != {LORA, DISTILLED, RECORD} | carried:
        raise PayloadError(f"records {sorted(content)}, expected lora, distilled, instruction")
    if RECORD not in content.config_records or len(content.array_records) != 2 + len(carried):
        raise PayloadError("a record of another kind than expected")
    instruction = read_instruction(dict(content.config_records[RECORD]))
    bench.phase(instruction.phase)
    rows = (
        instruction.retained_rank,
        instruction.residual_rank,
        instruction.num_reference_directions,
    )
    received = [_raw(content.array_records[name]) for name in sorted(content.array_records)]

    def decode() -> State:
        return _state(content, bench, instruction)

    state: State = bench.latest.get_or_compute("state", (instruction.rank, rows, received), decode)
    return state, instruction


def request_name(message: Message, instruction: Instruction, run: str) -> str:
    """A name for all that is asked: equal only for what is the same to the byte, in one run.

    Args:
        message: carries the adapters.
        instruction: the message's, or that of an evaluation which it carries along: asked for
            alone, it has the same name.
        run: of whose run it is: other settings make another answer.
    """
    hashed = hashlib.blake2b(digest_size=32)
    hashed.update(json.dumps(run).encode())
    hashed.update(json.dumps(instruction.to_config(), sort_keys=True).encode())
    for name in (DISTILLED, HEADS, LORA):
        if name not in message.content:
            continue
        for key, array in sorted(message.content.array_records[name].items()):
            hashed.update(f"{name} {key} {array.dtype} {array.shape}".encode())
            hashed.update(array.data)
    return hashed.hexdigest()


def _raw(record: ArrayRecord) -> dict[str, tuple[object, ...]]:
    """All there is of a record."""
    return {key: (a.dtype, a.shape, a.stype, a.data) for key, a in record.items()}


def _state(content: RecordDict, bench: Workbench, instruction: Instruction) -> State:
    scaling = bench.experiment.adapter.lora_alpha / instruction.rank
    current = _adapter(content.array_records[LORA], bench, instruction.rank, scaling)
    held = instruction.retained_rank
    rank = held + instruction.residual_rank
    distilled = _adapter(content.array_records[DISTILLED], bench, rank, 1.0)
    heads = _heads(content.array_records[HEADS], bench) if HEADS in content else {}
    reference = instruction.num_reference_directions
    if not instruction.residual_rank:
        return State(current, distilled, None, reference, heads)
    return State(current, *split(distilled, held), reference, heads)


def _heads(record: ArrayRecord, bench: Workbench) -> dict[str, Tensor]:
    """Label heads of tasks of the run, and of no others."""
    if not set(record) <= set(bench.tasks):
        raise PayloadError("heads: a task that is not of this run")
    size = bench.model.embedding_size
    return read_heads(record, {task: (len(bench.labels(task)), size + 1) for task in record})


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
    record: str = LORA,
) -> Message:
    """A local update: the trained factors (or sums, in another ``record``), which request it
    answers, its figures; and, where they were asked for, a code and the counts of the model that
    arrived."""
    status = ConfigRecord(
        {
            "code": "ok",
            "stage": instruction.stage,
            "phase": instruction.phase,
            "server_round": instruction.server_round,
        }
    )
    metrics = MetricRecord(dict(update.figures))
    arrays = {key: Array(np.ascontiguousarray(value)) for key, value in update.arrays.items()}
    content = RecordDict({STATUS: status, record: ArrayRecord(arrays), METRICS: metrics})
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
