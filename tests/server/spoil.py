"""Makers of mutations: a mutation takes a client's good reply and spoils it in place."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Message, MetricRecord

TEXT = "patient 17 has gout"
Mutation = Callable[[Message, torch.Generator], None]
Change = Callable[[np.ndarray, torch.Generator], np.ndarray]


def number(generator: torch.Generator, low: int, high: int) -> int:
    """An integer from ``low`` to ``high``."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def some_key(reply: Message, generator: torch.Generator, dtype: str = "", end: str = "") -> str:
    """The name of a random array, of the given type and ending if asked for."""
    record = reply.content["lora"]
    keys = [k for k, a in record.items() if a.dtype.startswith(dtype) and k.endswith(end)]
    return keys[number(generator, 0, len(keys) - 1)]


def changed(change: Change, dtype: str = "", end: str = "") -> Mutation:
    """Replace one array by another."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        key = some_key(reply, generator, dtype, end)
        record = reply.content["lora"]
        record[key] = Array(np.ascontiguousarray(change(record[key].numpy(), generator)))

    return mutate


def one_value(value: float) -> Mutation:
    """Put ``value`` somewhere into a float array."""

    def change(array: np.ndarray, generator: torch.Generator) -> np.ndarray:
        array = array.copy()
        array.flat[number(generator, 0, array.size - 1)] = value
        return array

    return changed(change, "float")


def every_float(value: float) -> Mutation:
    def mutate(reply: Message, generator: torch.Generator) -> None:
        record = reply.content["lora"]
        for key in [k for k, a in record.items() if a.dtype == "float32"]:
            record[key] = Array(np.full(record[key].shape, value, np.float32))

    return mutate


def every_array(change: Change) -> Mutation:
    """Replace every float array by another."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        record = reply.content["lora"]
        for key in [k for k, a in record.items() if a.dtype == "float32"]:
            made = np.ascontiguousarray(change(record[key].numpy(), generator), np.float32)
            record[key] = Array(made)

    return mutate


def alternating(value: float) -> Mutation:
    """The same size everywhere, every other one negative."""

    def change(array: np.ndarray, generator: torch.Generator) -> np.ndarray:
        signs = np.where(np.arange(array.size) % 2, -1.0, 1.0)
        return value * signs.reshape(array.shape)

    return every_array(change)


def times(value: float) -> Mutation:
    return every_array(lambda array, generator: value * array)


def as_type(dtype: str) -> Mutation:
    return changed(lambda array, generator: array.astype(dtype))


def rebytes(change: Callable[[bytes, torch.Generator], bytes], stype: str = "") -> Mutation:
    """Change the bytes of one array under an honest header."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        record, key = reply.content["lora"], some_key(reply, generator)
        good = record[key]
        data = change(good.data, generator)
        record[key] = Array(good.dtype, good.shape, stype or good.stype, data)

    return mutate


def behind_header(change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
    """An honest outer header over the bytes of another array."""
    return rebytes(lambda data, generator: saved(change(np.load(BytesIO(data)))))


def saved(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def zipped(data: bytes, generator: torch.Generator) -> bytes:
    file = BytesIO()
    np.savez(file, np.load(BytesIO(data)))
    return file.getvalue()


def lying_shape(shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Mutation:
    """Good bytes under an outer header of another shape."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        record, key = reply.content["lora"], some_key(reply, generator)
        good = record[key]
        record[key] = Array(good.dtype, shape(good.shape), good.stype, good.data)

    return mutate


def vast_inside(data: bytes, generator: torch.Generator) -> bytes:
    """numpy's own header promises 2^40 rows; the length stays as it was."""
    start = data.index(b"'shape': (") + len(b"'shape': (")
    end = data.index(b")", start)
    wide = b"1099511627776, 1)"
    spaces = data[end + 1 :]
    surplus = len(wide) - (end + 1 - start)
    return data[:start] + wide + spaces.replace(b" " * surplus, b"", 1)


def renamed(name: Callable[[str], str], keep: bool = False) -> Mutation:
    def mutate(reply: Message, generator: torch.Generator) -> None:
        record, key = reply.content["lora"], some_key(reply, generator)
        array = record[key] if keep else record.pop(key)
        if name(key):
            record[name(key)] = array

    return mutate


def other_factor(reply: Message, generator: torch.Generator) -> None:
    """Send the factor that is not asked for; where both are, one of the other adapter."""
    record, key = reply.content["lora"], some_key(reply, generator)
    other = key.replace("lora_A", "#").replace("lora_B", "lora_A").replace("#", "lora_B")
    name = other if other not in record else key.replace("lora_", "retained_")
    record[name] = record[key]


def figures(**values: object) -> Mutation:
    """Replace figures; None takes one away."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        new = {**reply.content["metrics"], **values}
        metrics = MetricRecord({k: v for k, v in new.items() if v is not None})
        reply.content["metrics"] = metrics

    return mutate


def said(**values: object) -> Mutation:
    """Replace fields of the status; None takes one away."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        new = {**reply.content["status"], **values}
        reply.content["status"] = ConfigRecord({k: v for k, v in new.items() if v is not None})

    return mutate


def placed(name: str, record: Callable[[], object]) -> Mutation:
    def mutate(reply: Message, generator: torch.Generator) -> None:
        reply.content[name] = record()

    return mutate


def removed(name: str) -> Mutation:
    def mutate(reply: Message, generator: torch.Generator) -> None:
        del reply.content[name]

    return mutate


def only_text(reply: Message, generator: torch.Generator) -> None:
    reply.content.clear()
    reply.content["notes"] = ConfigRecord({"question": TEXT})


def emptied(reply: Message, generator: torch.Generator) -> None:
    reply.__dict__["_content"] = None


def padding(least: int, most: int) -> Mutation:
    return rebytes(lambda data, g: data + b"x" * number(g, least, most))


def truncation(least: int, most: int) -> Mutation:
    return rebytes(lambda data, g: data[: -number(g, least, most)])
