"""Every way in which a client's reply can be wrong that we can think of: a mutation takes a good
reply and spoils it in place."""

import pickle
from collections.abc import Callable
from functools import partial
from io import BytesIO

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord

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


text_record = partial(ConfigRecord, {"question": TEXT})
spent = partial(figures, epsilon=1.0, delta=1e-4, simulation_only=1.0)
array_record = partial(ArrayRecord, {"x": Array(np.zeros((2, 2), np.float32))})

MUTATIONS: dict[str, Mutation] = {
    "NaN": one_value(np.nan),
    "Inf": one_value(np.inf),
    "-Inf": one_value(-np.inf),
    "all NaN": every_float(np.nan),
    "huge": every_float(1e30),
    "largest float": every_float(float(np.finfo(np.float32).max)),
    "beyond the bound": every_float(1e3),
    "a million times": times(1e6),
    "largest floats, alternating": alternating(float(np.finfo(np.float32).max)),
    "one of 3e38": one_value(3e38),
    "transposed": changed(lambda a, g: a.T, end="weight"),
    "broadcastable": changed(lambda a, g: a[:1], end="weight"),
    "one number": changed(lambda a, g: a.reshape(-1)[:1].reshape((1,) * a.ndim), end="weight"),
    "no dimension": changed(lambda a, g: a.reshape(-1)[0]),
    "flat": changed(lambda a, g: a.reshape(-1), end="weight"),
    "one row more": changed(lambda a, g: np.concatenate([a, a[:1]])),
    "one row less": changed(lambda a, g: a[1:]),
    "empty array": changed(lambda a, g: a[:0]),
    "an axis more": changed(lambda a, g: a[None]),
    "extra key": renamed(lambda key: "classifier.weight", keep=True),
    "key of a megabyte": renamed(lambda key: "k" * 2**20, keep=True),
    "a frozen or foreign factor": other_factor,
    "missing key": renamed(lambda key: ""),
    "renamed key": renamed(lambda key: key.removeprefix("base_model.")),
    "upper case": renamed(lambda key: key.upper()),
    "empty record": placed("lora", ArrayRecord),
    "float64": as_type("float64"),
    "float16": as_type("float16"),
    "int32": as_type("int32"),
    "bool": as_type("bool"),
    "complex": as_type("complex64"),
    "text array": as_type("str"),
    "pickled objects": rebytes(lambda d, g: saved(np.array([{}, "x"], dtype=object))),
    "pickle": rebytes(lambda d, g: pickle.dumps(np.load(BytesIO(d)))),
    "zip": rebytes(zipped),
    "truncated": truncation(1, 40),
    "half": rebytes(lambda d, g: d[: len(d) // 2]),
    "no bytes": rebytes(lambda d, g: b""),
    "padded a little": padding(1, 100),
    "padded": padding(101, 5000),
    "zeros": rebytes(lambda d, g: b"\0" * len(d)),
    "noise": rebytes(lambda d, g: bytes(torch.randint(256, (len(d),), generator=g).tolist())),
    "noise in the header": rebytes(lambda d, g: d[:8] + b"\xff\xff" + d[10:]),
    "another serialisation": rebytes(lambda d, g: d, "torch"),
    "another shape inside": behind_header(lambda a: a[..., None]),
    "another type inside": behind_header(lambda a: a.view(f"uint{8 * a.itemsize}")),
    "another byte order inside": behind_header(lambda a: a.astype(">f4")),
    "a vast shape inside": rebytes(vast_inside),
    "lying shape": lying_shape(lambda shape: (*shape[:-1], shape[-1] + 1)),
    "negative shape": lying_shape(lambda shape: tuple(-n for n in shape)),
    "vast shape": lying_shape(lambda shape: (2**62, 2**62)),
    "shape of many axes": lying_shape(lambda shape: (2**62,) * 50_000),
    "weight below one": figures(num_examples=0.5),
    "smallest weight": figures(num_examples=5e-324),
    "negative weight": figures(num_examples=-5),
    "zero weight": figures(num_examples=0),
    "NaN weight": figures(num_examples=float("nan")),
    "infinite weight": figures(num_examples=float("inf")),
    "huge weight": figures(num_examples=10**12),
    "weight beyond floats": figures(num_examples=10**400),
    "list of weights": figures(num_examples=[1, 2]),
    "no weight": figures(num_examples=None),
    "NaN loss": figures(loss=float("nan")),
    "list of losses": figures(loss=[0.5]),
    "NaN epsilon": figures(epsilon=float("nan")),
    "half a seed": spent(simulation_only=0.5),
    "half of disjoint": spent(disjoint_tasks=-1.0),
    "epsilon alone": figures(epsilon=1.0),
    "epsilon without delta": spent(delta=None),
    "negative epsilon": spent(epsilon=-1.0),
    "delta beyond one": spent(delta=2.0),
    "infinite seconds": figures(seconds=float("-inf")),
    "extra figure": figures(age=[17, 18]),
    "wrong round": said(server_round=77),
    "round before": said(server_round=0),
    "round as text": said(server_round="1"),
    "no round": said(server_round=None),
    "wrong phase": said(phase="prototypes"),
    "no phase": said(phase=None),
    "wrong task": said(stage=9),
    "no task": said(stage=None),
    "text in the status": said(note=TEXT),
    "own failure": said(code="failed"),
    "no code": said(code=None),
    "code of 10 MB": said(code="x" * 10_000_000),
    "code with controls": said(code="\x1b[2J\n[bold]ok"),
    "code in bytes": said(code=b"ok"),
    "extra text": placed("notes", text_record),
    "extra arrays": placed("retained", array_record),
    "no status": removed("status"),
    "no adapter": removed("lora"),
    "no figures": removed("metrics"),
    "only text": only_text,
    "nothing at all": emptied,
    "adapter of another kind": placed("lora", text_record),
    "figures of another kind": placed("metrics", text_record),
    "status of another kind": placed("status", array_record),
}
"""For every wire format."""

INT8: dict[str, Mutation] = {
    "code -128": changed(lambda a, g: np.full_like(a, -128), "int8"),
    "negative scale": changed(lambda a, g: -a - 1, "float32", ".scale"),
    "scale of one number": changed(lambda a, g: a[:1], end=".scale"),
    "no scale": lambda reply, g: (
        reply.content["lora"].pop(some_key(reply, g, end=".scale")) and None
    ),
    "values, not codes": changed(lambda a, g: a.astype(np.float32), "int8"),
}
"""For the coded format alone."""

COUNTS: dict[str, Mutation] = {
    "NaN counts": figures(correct=[float("nan")] * 2),
    "infinite counts": figures(correct=[float("inf")] * 2),
    "fractions": figures(correct=[0.5, 0.5]),
    "more right than asked": figures(correct=[9, 9]),
    "more right among all labels than asked": figures(correct_all=[1, 9]),
    "negative counts among all labels": figures(correct_all=[-1, 1]),
    "fractions among all labels": figures(correct_all=[0.5, 0.5]),
    "no counts among all labels": figures(correct_all=None),
    "a task more among all labels": figures(correct_all=[1, 1, 1]),
    "negative counts": figures(correct=[-1, 1]),
    "huge counts": figures(examples=[10**12, 10**12]),
    "one task less": figures(correct=[1], examples=[2]),
    "lists of two lengths": figures(examples=[2, 2, 2]),
    "a number": figures(correct=1),
    "no counts": figures(correct=None),
    "extra figure": figures(age=[17, 18]),
    "text in the status": said(note=TEXT),
    "own failure": said(code="failed"),
    "no data": said(code="no-data"),
    "extra text": placed("notes", text_record),
    "extra arrays": placed("lora", array_record),
    "no status": removed("status"),
    "no figures": removed("metrics"),
    "only text": only_text,
    "nothing at all": emptied,
    "figures of another kind": placed("metrics", text_record),
}
"""For the answer to an evaluation request of two tasks."""
