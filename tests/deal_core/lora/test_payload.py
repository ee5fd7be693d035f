from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pytest
import torch

from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, zero_adapter
from deal_core.lora.arrays import from_arrays, to_arrays
from deal_core.lora.payload import (
    PayloadError,
    Template,
)
from deal_core.wire.adapter_record import BOTH, decode_checked, unpack

SHAPES = {"first": (12, 20), "second": (30, 16)}
TEMPLATE = Template(SHAPES, 3)
KEY = "base_model.model.first.lora_A.weight"


def some_adapter() -> Adapter:
    generator = torch.Generator().manual_seed(1)
    return Adapter(
        {
            name: LoraFactors(
                torch.randn(3, d_in, generator=generator),
                torch.randn(d_out, 3, generator=generator),
            )
            for name, (d_out, d_in) in SHAPES.items()
        },
        2.0,
    )


@dataclass
class Wire:
    """Flower's Array, as far as the payload knows it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    stype: str = "numpy.ndarray"


def wire(array: np.ndarray) -> Wire:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return Wire(str(array.dtype), array.shape, buffer.getvalue())


def record() -> dict[str, Wire]:
    return {key: wire(value) for key, value in to_arrays(some_adapter()).items()}


def read_record(arrived: dict[str, Wire], template: Template, scaling: float) -> Adapter:
    arrays = decode_checked(arrived, "float32", template, BOTH)
    return unpack(arrays, "float32", zero_adapter(template.shapes, template.rank, scaling))


def test_round_trip():
    adapter = some_adapter()
    assert relative_difference(read_record(record(), TEMPLATE, 2.0), adapter) < 1e-12
    assert relative_difference(from_arrays(to_arrays(adapter), TEMPLATE, 2.0), adapter) < 1e-12


def test_keys_are_those_of_peft():
    assert set(record()) == {
        f"base_model.model.{layer}.lora_{factor}.weight"
        for layer in ("first", "second")
        for factor in "AB"
    }


FAULTS = {
    "extra key": lambda r: r.update(classifier=wire(np.zeros((2, 2), np.float32))),
    "missing key": lambda r: r.pop(KEY),
    "transposed": lambda r: r.update({KEY: wire(np.zeros((20, 3), np.float32))}),
    "broadcastable": lambda r: r.update({KEY: wire(np.zeros((1, 20), np.float32))}),
    "empty": lambda r: r.update({KEY: wire(np.zeros((0, 20), np.float32))}),
    "float64": lambda r: r.update({KEY: wire(np.zeros((3, 20)))}),
    "nan": lambda r: r.update({KEY: wire(np.full((3, 20), np.nan, np.float32))}),
    "inf": lambda r: r.update({KEY: wire(np.full((3, 20), np.inf, np.float32))}),
    "truncated": lambda r: r.update({KEY: Wire("float32", (3, 20), record()[KEY].data[:-8])}),
    "padded": lambda r: r.update({KEY: Wire("float32", (3, 20), record()[KEY].data + b"x" * 900)}),
    "header lies": lambda r: r.update(
        {KEY: Wire("float32", (3, 20), wire(np.zeros((20, 3), np.float32)).data)}
    ),
    "pickle": lambda r: r.update(
        {KEY: Wire("float32", (3, 20), wire(np.array([{}] * 40, dtype=object)).data)}
    ),
    "garbage": lambda r: r.update({KEY: Wire("float32", (3, 20), b"\0" * 368)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_refused(fault):
    broken = record()
    FAULTS[fault](broken)
    with pytest.raises(PayloadError):
        read_record(broken, TEMPLATE, 2.0)


@pytest.mark.parametrize("shape", [(3, 20), (20, 3), (3, 20, 1)])
@pytest.mark.parametrize("cut", [None, -8])
def test_a_refusal_never_repeats_a_value(shape, cut):
    values = np.full(shape, 123456.75, np.float32)
    values.flat[7] = np.nan
    broken = record()
    broken[KEY] = wire(values)
    broken[KEY].data = broken[KEY].data[:cut]
    with pytest.raises(PayloadError) as refusal:
        read_record(broken, TEMPLATE, 2.0)
    assert "nan" not in str(refusal.value)
    assert "123456" not in str(refusal.value)
