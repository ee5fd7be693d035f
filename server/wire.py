"""Flower records to the project's own types and back, with the checks of the server's side."""

from __future__ import annotations

import math

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from deal_core.adapters import Adapter, stack
from deal_core.aggregation import ClientUpdate
from deal_core.instruction import RECORD, Instruction
from deal_core.methods import State
from deal_core.payload import DISTILLED, LORA, PayloadError, Template, read_record, to_arrays

MOST_EXAMPLES = 10_000_000
"""A larger count is a lie or a bug; either would take over the average."""


class NoData(Exception):
    """The client has no example of this task: not a fault."""


def request(
    state: State, instruction: Instruction, node: int, message_type: str, deadline: float
) -> Message:
    """Build a request; it is valid until the deadline, so that nobody works on a stale one."""
    content = RecordDict(
        {
            LORA: _record(state.current),
            DISTILLED: _record(stack(state.parts()[:-1])),
            RECORD: ConfigRecord(instruction.to_config()),
        }
    )
    return Message(content, node, message_type, ttl=deadline)


def read_update(
    client: str, message: Message, before: Adapter, instruction: Instruction
) -> tuple[ClientUpdate, dict[str, float]]:
    """Check and decode a local update.

    Raises:
        PayloadError: an error code, another record, a wrong round, or anything that
            ``payload.read_record`` refuses.
        NoData: the client has nothing to learn from.
    """
    content = message.content
    code = status(content)
    if code == "no-data":
        raise NoData
    if code != "ok":
        raise PayloadError(f"client reports '{code[:40]}'")
    if set(content) != {"status", LORA, "metrics"}:
        raise PayloadError("records other than status, lora, metrics")
    answered = content.config_records["status"]
    for key in ("task_index", "server_round"):
        if answered.get(key) != getattr(instruction, key):
            raise PayloadError(f"answers another {key}")
    figures = content.metric_records["metrics"]
    weight = _number(figures.get("num_examples"))
    if not 0 < weight <= MOST_EXAMPLES:
        raise PayloadError("num_examples out of bounds")
    template = Template(before.shapes, before.rank)
    adapter = read_record(content.array_records[LORA], template, before.scaling)
    measured = {
        "num_examples": weight,
        "loss": _number(figures.get("loss")),
        "seconds": _number(figures.get("seconds")),
    }
    return ClientUpdate(client, adapter, weight), measured


def read_counts(message: Message, tasks: int) -> list[list[int]]:
    """Return ``[correct, examples]`` per task.

    Raises:
        PayloadError: an error code, or counts that cannot be.
    """
    code = status(message.content)
    if code != "ok":
        raise PayloadError(f"client reports '{code[:40]}'")
    if "metrics" not in message.content.metric_records:
        raise PayloadError("counts are missing")
    figures = message.content.metric_records["metrics"]
    correct, examples = figures.get("correct"), figures.get("examples")
    if not isinstance(correct, list) or not isinstance(examples, list):
        raise PayloadError("counts are missing")
    counts = [[int(c), int(n)] for c, n in zip(correct, examples, strict=False)]
    if len(counts) != tasks or any(not 0 <= c <= n <= MOST_EXAMPLES for c, n in counts):
        raise PayloadError("counts out of bounds")
    return counts


def status(content: RecordDict) -> str:
    """The code that a reply carries; empty when it carries none."""
    if "status" not in content.config_records:
        return ""
    return str(content.config_records["status"].get("code", ""))


def payload_bytes(content: RecordDict) -> int:
    """Bytes of the arrays in a message: what a round costs on the wire, framing aside."""
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())


def _record(adapter: Adapter) -> ArrayRecord:
    return ArrayRecord({key: Array(value) for key, value in to_arrays(adapter).items()})


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise PayloadError("a figure is missing or not finite")
