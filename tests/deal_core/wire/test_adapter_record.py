from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array

from deal_core.aggregation.running import one_vector
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, zero_adapter
from deal_core.lora.payload import PayloadError
from deal_core.randomness import seeded
from deal_core.wire.adapter_record import (
    BOTH,
    EXACT,
    UpdateReader,
    pack,
    pack_update,
    unpack,
)
from deal_core.wire.codec import CODECS

SHAPES = {"first": (12, 20), "second": (30, 16)}
B_ONLY = frozenset({"lora_B"})


@pytest.fixture
def drawn(random_adapter):
    return lambda seed: random_adapter(SHAPES, 3, 2.0, seed)


def with_b_of(other: Adapter, adapter: Adapter) -> Adapter:
    layers = {n: LoraFactors(f.A, other.layers[n].B) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.scaling)


def received(encoded, before: Adapter, dtype: str) -> Adapter:
    """What the server makes of the encoded ``lora_B``."""
    record = {key: Array(np.ascontiguousarray(value)) for key, value in encoded.items()}
    return UpdateReader(before, dtype, B_ONLY).read(record)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("bfloat16", 0.01), ("int8", 0.03)])
def test_round_trip_both_ways(dtype, bound, drawn):
    before, after = drawn(1), with_b_of(drawn(2), drawn(1))
    down = unpack(pack(before, dtype, seeded(1)), dtype, before)
    assert relative_difference(down, before) <= bound + 1e-12
    encoded, _ = pack_update(after, before, dtype, B_ONLY, {}, seeded(2))
    up = received(encoded, before, dtype)
    assert relative_difference(up, after) <= bound + 1e-12
    # what did not travel is what the server sent, to the bit
    assert all(torch.equal(up.layers[n].A, before.layers[n].A) for n in SHAPES)


def test_one_factor_in_int8_costs_an_eighth_of_the_exact_pair(drawn):
    before, after = drawn(1), drawn(2)
    full, _ = pack_update(after, before, EXACT, BOTH, {}, seeded(0))
    small, _ = pack_update(with_b_of(after, before), before, "int8", B_ONLY, {}, seeded(0))
    b_values = sum(d_out * 3 for d_out, _ in SHAPES.values())
    sizes = [sum(array.nbytes for array in sent.values()) for sent in (small, full)]
    assert sizes[0] == b_values + 2 * 3 * 4  # codes, and a scale per direction
    assert sizes[1] == 4 * sum((d_out + d_in) * 3 for d_out, d_in in SHAPES.values())


@pytest.mark.parametrize("dtype", CODECS)
def test_a_factor_that_did_not_learn_may_not_travel(dtype, drawn):
    before, after = drawn(1), drawn(2)
    encoded, _ = pack_update(after, before, dtype, BOTH, {}, seeded(0))
    with pytest.raises(PayloadError, match="unexpected key"):
        received(encoded, before, dtype)


@pytest.mark.parametrize("dtype", CODECS)
@pytest.mark.parametrize("trained", [BOTH, B_ONLY, frozenset({"lora_A"})])
def test_an_update_is_decoded_into_one_piece_of_memory(dtype, trained, drawn):
    before = drawn(1)
    encoded, _ = pack_update(drawn(2), before, dtype, trained, {}, seeded(0))
    record = {key: Array(np.ascontiguousarray(value)) for key, value in encoded.items()}
    read = UpdateReader(before, dtype, trained).read(record)
    decoded = [
        tensor
        for name in SHAPES
        for key, tensor in (("lora_A", read.layers[name].A), ("lora_B", read.layers[name].B))
        if key in trained
    ]
    vector = one_vector(decoded)
    assert vector.data_ptr() == decoded[0].data_ptr()
    assert torch.equal(vector, torch.cat([tensor.flatten() for tensor in decoded]))


def test_a_change_that_overflows_is_refused(drawn):
    """Each part is finite, the sum is not."""
    before = drawn(1)
    huge = Adapter({n: LoraFactors(f.A, f.B * 0 + 3e38) for n, f in before.layers.items()}, 2.0)
    encoded, _ = pack_update(huge, zero_adapter(SHAPES, 3, 2.0), "bfloat16", B_ONLY, {}, seeded(0))
    with pytest.raises(PayloadError, match=r"first\.lora_B.*not finite"):
        received(encoded, huge, "bfloat16")
