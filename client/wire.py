"""Flower records to the project's own types and back, with the checks of the client's side."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client.work import Update
from deal_core.adapters import split
from deal_core.config import AdapterConfig
from deal_core.instruction import RECORD, Instruction, read_instruction
from deal_core.methods import State
from deal_core.payload import DISTILLED, LORA, PayloadError, Template, read_record, to_arrays

STATUS = "status"
"""Record that says how a request ended; its ``code`` is ``ok``, ``no-data`` or an error code."""
METRICS = "metrics"


def read_request(
    message: Message, shapes: dict[str, tuple[int, int]], adapter: AdapterConfig
) -> tuple[State, Instruction]:
    """Check and decode a server's request.

    Raises:
        PayloadError: a record too many or too few, or anything in one that is not expected.
    """
    content = message.content
    if set(content) != {LORA, DISTILLED, RECORD}:
        raise PayloadError(f"records {sorted(content)}, expected lora, distilled, instruction")
    instruction = read_instruction(dict(content.config_records[RECORD]))
    current = read_record(
        content.array_records[LORA],
        Template(shapes, instruction.rank),
        adapter.lora_alpha / adapter.rank,
    )
    distilled = read_record(
        content.array_records[DISTILLED],
        Template(shapes, instruction.retained_rank + instruction.residual_rank),
        1.0,
    )
    if not instruction.residual_rank:
        return State(current, distilled), instruction
    retained, residual = split(distilled, instruction.retained_rank)
    return State(current, retained, residual), instruction


def status_reply(message: Message, code: str) -> Message:
    """A reply that carries a code and nothing else."""
    return Message(RecordDict({STATUS: ConfigRecord({"code": code})}), reply_to=message)


def update_reply(message: Message, update: Update, instruction: Instruction) -> Message:
    """A local update: the current adapter, which request it answers, its figures."""
    status = ConfigRecord(
        {
            "code": "ok",
            "task_index": instruction.task_index,
            "server_round": instruction.server_round,
        }
    )
    metrics = MetricRecord(
        {"num_examples": update.num_examples, "loss": update.loss, "seconds": update.seconds}
    )
    arrays = {key: Array(value) for key, value in to_arrays(update.adapter).items()}
    content = RecordDict({STATUS: status, LORA: ArrayRecord(arrays), METRICS: metrics})
    return Message(content, reply_to=message)


def evaluation_reply(message: Message, counts: dict[str, list[int]]) -> Message:
    """Counts per task, in the order of the request."""
    content = RecordDict({STATUS: ConfigRecord({"code": "ok"}), METRICS: MetricRecord({**counts})})
    return Message(content, reply_to=message)
