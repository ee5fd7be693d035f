"""Adapters and label heads on the wire: round trips, unbiased rounding, error feedback, refusal of
all else."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.functional import normalize

from deal_core.aggregation.running import one_vector
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, zero_adapter
from deal_core.lora.payload import PREFIX, PayloadError, factor_of
from deal_core.lora.state import by_key, from_arrays, to_arrays, with_factors
from deal_core.randomness import seeded
from deal_core.wire.tensors import (
    BOTH,
    CODECS,
    EXACT,
    encode,
    pack_heads,
    pack_update,
    read_heads,
    require_bounded,
    selected,
    tasks_in,
    unpack,
)

SHAPES = {"first": (12, 20), "second": (30, 16)}
KEY = f"{PREFIX}first.lora_B.weight"
ONLY_B = frozenset({"lora_B"})
TRAINED = (BOTH, ONLY_B, frozenset({"lora_A"}))


@dataclass
class Wire:
    """Flower's Array, as far as the wire knows it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    stype: str = "numpy.ndarray"


def wire(array):
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return Wire(str(array.dtype), array.shape, buffer.getvalue())


def record(arrays):
    return {key: wire(np.ascontiguousarray(value)) for key, value in arrays.items()}


@pytest.fixture
def drawn(random_adapter):
    return lambda seed: random_adapter(SHAPES, 3, 2.0, seed)


def sent(adapter, dtype, trained=ONLY_B, seed=0):
    """The arrays of a whole adapter, or of some of its factors."""
    return encode(dtype, selected(adapter, trained), seeded("wire", seed))


def with_b_of(other, adapter):
    layers = {n: LoraFactors(f.A, other.layers[n].B) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.scaling)


def one(dtype, array, factor, seed=0):
    """Send one array as the given factor of a layer."""
    key, codec = f"{PREFIX}q.{factor}.weight", CODECS[dtype]
    return codec.decode(key, codec.encode(key, array, seeded("one", seed)))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("int8", 0.03)])
@pytest.mark.parametrize("trained", TRAINED)
def test_only_the_trained_factors_travel_and_come_back(dtype, bound, trained, drawn):
    before, other = drawn(1), drawn(2)
    down = unpack(record(sent(before, dtype, BOTH)), dtype, before)
    assert relative_difference(down, before) <= bound + 1e-12
    after = with_factors(
        before, {k: v for k, v in by_key(other).items() if factor_of(k) in trained}
    )
    encoded, _ = pack_update(after, before, dtype, trained, {}, seeded(2))
    assert {key.removesuffix(".scale") for key in encoded} == selected(after, trained).keys()
    up = unpack(record(encoded), dtype, before, trained)
    assert relative_difference(up, after) <= bound + 1e-12
    pairs = [(up.layers[n], before.layers[n]) for n in SHAPES]
    kept = [(a.A, b.A) for a, b in pairs] if "lora_A" not in trained else []
    kept += [(a.B, b.B) for a, b in pairs] if "lora_B" not in trained else []
    assert all(new is old for new, old in kept)
    decoded = [t for a, _ in pairs for f, t in (("A", a.A), ("B", a.B)) if f"lora_{f}" in trained]
    vector = one_vector(decoded)  # in one piece of memory
    assert vector.data_ptr() == decoded[0].data_ptr()
    assert torch.equal(vector, torch.cat([tensor.flatten() for tensor in decoded]))


def test_keys_are_those_of_peft_and_arrays_make_the_adapter_again(drawn):
    arrays = to_arrays(drawn(1))
    keys = {f"base_model.model.{layer}.lora_{f}.weight" for layer in SHAPES for f in "AB"}
    assert arrays.keys() == keys
    assert relative_difference(from_arrays(arrays, SHAPES, 3, 2.0), drawn(1)) < 1e-12
    for spoilt in ({}, {**arrays, "more": arrays[KEY]}, {**arrays, KEY: arrays[KEY] * np.nan}):
        with pytest.raises(PayloadError):
            from_arrays(spoilt, SHAPES, 3, 2.0)


def test_one_factor_in_int8_costs_an_eighth_of_the_exact_pair(drawn):
    before, after = drawn(1), drawn(2)
    full, _ = pack_update(after, before, EXACT, BOTH, {}, seeded(0))
    small, _ = pack_update(with_b_of(after, before), before, "int8", ONLY_B, {}, seeded(0))
    b_values = sum(d_out * 3 for d_out, _ in SHAPES.values())
    sizes = [sum(array.nbytes for array in each.values()) for each in (small, full)]
    assert sizes[0] == b_values + 2 * 3 * 4  # codes, and a scale per direction
    assert sizes[1] == 4 * sum((d_out + d_in) * 3 for d_out, d_in in SHAPES.values())


def test_a_change_that_overflows_is_refused(drawn):
    """Each part is finite, the sum is not."""
    before = drawn(1)
    huge = Adapter({n: LoraFactors(f.A, f.B * 0 + 3e38) for n, f in before.layers.items()}, 2.0)
    encoded, _ = pack_update(huge, zero_adapter(SHAPES, 3, 2.0), "int8", ONLY_B, {}, seeded(0))
    with pytest.raises(PayloadError, match=r"first\.lora_B.*not finite"):
        unpack(record(encoded), "int8", huge, ONLY_B)


def matrices(low, high):
    finite = st.floats(low, high, width=32)
    shape = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return hnp.arrays(np.float32, shape, elements=finite)


@given(matrices(-(2.0**120), 2.0**120), st.sampled_from(["lora_A", "lora_B"]))
@settings(deadline=None, derandomize=True)
def test_int8_is_off_by_less_than_one_step_of_its_rank_direction(array, factor):
    axis = 1 if factor == "lora_A" else 0
    step = np.abs(array).max(axis=axis, keepdims=True).astype(np.float64) / 127
    gap = np.abs(one("int8", array, factor).astype(np.float64) - array)
    assert (gap <= 1.001 * step + 1e-37).all()


def test_stochastic_rounding_is_unbiased():
    array, draws = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), 1000
    step = np.abs(array).max(axis=0) / 127
    mean = np.mean([one("int8", array, "lora_B", seed) for seed in range(draws)], axis=0)
    assert (np.abs(mean - array) < 5 * (step / 2) / np.sqrt(draws) + 1e-6).all()


def test_error_feedback_makes_the_average_over_rounds_exact(drawn):
    before, lost, total_in, total_out, source = drawn(0), {}, 0.0, 0.0, seeded(0)
    for seed in range(1, 101):
        after = with_b_of(drawn(seed), before)
        encoded, lost = pack_update(after, before, "int8", ONLY_B, lost, source)
        up = unpack(record(encoded), "int8", before, ONLY_B)
        start = before.layers["first"].B
        total_in = total_in + (after.layers["first"].B - start).numpy()
        total_out = total_out + (up.layers["first"].B - start).numpy()
    assert np.abs(lost[KEY]).max() < 0.1
    np.testing.assert_allclose(total_in - total_out, lost[KEY], atol=5e-4)


@pytest.mark.parametrize("dtype", CODECS)
def test_what_was_decoded_is_encoded_again_to_the_bit(dtype):
    """A retained adapter is sent in every round: it must not wander, and clients know what they
    keep by its values."""
    codec, draw = CODECS[dtype], seeded(0)
    for size in (1e-4, 0.03, 5.0):
        for key, shape in (("l.lora_A.weight", (16, 1024)), ("l.lora_B.weight", (1024, 16))):
            drawn = size * torch.randn(shape, generator=draw).numpy()
            kept = codec.decode(key, codec.encode(key, drawn, draw))
            for _ in range(10):
                again = codec.decode(key, codec.encode(key, kept, draw))
                assert np.array_equal(again, kept)


def swapped(change):
    return lambda m: {**m, KEY: change(m[KEY])}


MUTATIONS = {
    "extra key": lambda m: {**m, "model.weight": m[KEY]},
    "missing key": lambda m: {k: v for k, v in m.items() if k != KEY},
    "empty": lambda m: {},
    "renamed key": lambda m: {k + "x" if k == KEY else k: v for k, v in m.items()},
    "number as key": lambda m: {**m, 3: m[KEY]},
    "float64": swapped(lambda a: a.astype(np.float64)),
    "int32": swapped(lambda a: a.astype(np.int32)),
    "other byte order": swapped(lambda a: a.astype(">f4")),
    "object": swapped(lambda a: a.astype(object)),
    "pickle": swapped(lambda a: np.array([{}] * 40, dtype=object)),
    "strings": swapped(lambda a: a.astype(str)),
    "complex": swapped(lambda a: a.astype(np.complex64)),
    "boolean": swapped(lambda a: a.astype(bool)),
    "structured": swapped(lambda a: np.zeros((12, 3), [("a", "f4")])),
    "transposed": swapped(lambda a: a.T),
    "broadcastable": swapped(lambda a: a[:1]),
    "truncated": swapped(lambda a: a.ravel()[:-1]),
    "flat": swapped(lambda a: a.ravel()),
    "extra axis": swapped(lambda a: a[None]),
    "scalar": swapped(lambda a: np.array(a[0, 0])),
    "no elements": swapped(lambda a: a[:0]),
    "huge": swapped(lambda a: np.zeros((12, 3000), a.dtype)),
}


@pytest.mark.parametrize("dtype", CODECS)
@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_a_mutated_message_is_refused(dtype, mutation, drawn):
    message = MUTATIONS[mutation](sent(drawn(1), dtype))
    with pytest.raises(PayloadError):
        unpack(record(message), dtype, drawn(1), ONLY_B)


BYTES = {
    "cut": lambda w: Wire(w.dtype, w.shape, w.data[:-8]),
    "longer": lambda w: Wire(w.dtype, w.shape, w.data + b"x" * 900),
    "a header that lies": lambda w: Wire(w.dtype, w.shape, wire(np.zeros((3, 12), w.dtype)).data),
    "no header": lambda w: Wire(w.dtype, w.shape, b"\0" * len(w.data)),
    "a pickle": lambda w: Wire(w.dtype, w.shape, wire(np.array([{}] * 40, dtype=object)).data),
    "another serialiser": lambda w: Wire(w.dtype, w.shape, w.data, "pickle"),
}


@pytest.mark.parametrize("fault", BYTES)
def test_bytes_that_are_not_those_of_the_header_are_refused(fault, drawn):
    message = record(sent(drawn(1), "float32"))
    message[KEY] = BYTES[fault](message[KEY])
    with pytest.raises(PayloadError):
        unpack(message, "float32", drawn(1), ONLY_B)


@pytest.mark.parametrize("dtype", CODECS)
@pytest.mark.parametrize("other", CODECS)
@pytest.mark.parametrize("trained", TRAINED)
def test_another_codec_or_other_factors_are_refused(dtype, other, trained, drawn):
    message = record(sent(drawn(1), dtype))
    if (dtype, trained) == (other, ONLY_B):
        unpack(message, other, drawn(1), trained)
    else:
        with pytest.raises(PayloadError):
            unpack(message, other, drawn(1), trained)


@pytest.mark.parametrize("dtype", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_neither_sent_nor_taken(dtype, value, drawn):
    message, spoilt = sent(drawn(1), dtype), drawn(1)
    spoilt.layers["first"].B[2, 1] = value
    with pytest.raises(PayloadError, match="not finite"):
        sent(spoilt, dtype)
    bits = {
        "float32": (KEY, np.float32(value)),
        "int8": (KEY + ".scale", np.float32(value)),
    }
    key, bad = bits[dtype]
    message[key] = message[key].copy()
    message[key].ravel()[1] = bad
    with pytest.raises(PayloadError, match="finite"):
        unpack(record(message), dtype, drawn(1), ONLY_B)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_value_of_a_thousand_is_the_largest(factor, drawn):
    adapter = drawn(1)
    values = getattr(adapter.layers["first"], factor)
    values[0, 0] = -1000.0
    require_bounded(adapter)
    values[0, 0] = -1000.1
    with pytest.raises(PayloadError, match="first: a value beyond 1000"):
        require_bounded(adapter)


def test_int8_refuses_codes_and_scales_that_nobody_sends(drawn):
    message = sent(drawn(1), "int8")
    low, negative, over = ({k: v.copy() for k, v in message.items()} for _ in range(3))
    low[KEY][0, 0] = -128
    negative[KEY + ".scale"][0] = -1.0
    over[KEY + ".scale"][0] = 3e38
    for bad in (low, negative, over):
        with pytest.raises(PayloadError):
            unpack(record(bad), "int8", drawn(1), ONLY_B)


@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (12, 3, 1)])
@pytest.mark.parametrize("cut", [None, -8])
def test_a_refusal_never_repeats_a_value(shape, cut, drawn):
    values = np.full(shape, 123456.75, np.float32)
    values.flat[7] = np.nan
    broken = record(sent(drawn(1), "float32"))
    broken[KEY] = wire(values)
    broken[KEY].data = broken[KEY].data[:cut]
    with pytest.raises(PayloadError) as refusal:
        unpack(broken, "float32", drawn(1), ONLY_B)
    assert "nan" not in str(refusal.value)
    assert "123456" not in str(refusal.value)


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_random_bytes_in_place_of_an_array_never_pass_as_something_else(data):
    """Whatever the codes, the decoded tensors are finite and of the expected shape, or refused."""
    dtype, like = data.draw(st.sampled_from(sorted(CODECS))), zero_adapter({"q": (6, 5)}, 3)
    headers = CODECS[dtype].headers(f"{PREFIX}q.lora_B.weight", (6, 3))
    message = {
        key: np.frombuffer(
            data.draw(st.binary(min_size=h.nbytes, max_size=h.nbytes)), h.dtype
        ).reshape(h.shape)
        for key, h in headers.items()
    }
    try:
        found = unpack(record(message), dtype, like, ONLY_B).layers["q"].B
    except PayloadError:
        return
    assert found.shape == (6, 3)
    assert bool(found.isfinite().all())


SIZE = 24
Arrays = dict[str, np.ndarray]


def heads():
    """Of few values and of large ones; with a huge bias, and a row of zeros."""
    generator = seeded("heads")
    large = 30 * torch.randn(4, SIZE + 1, generator=generator)
    large[1, -1] = -1e9
    large[2, :-1] = 0.0
    return {"skin": large, "eye": torch.randn(3, SIZE + 1, generator=generator)}


def shapes(own):
    return {task: (head.shape[0], head.shape[1]) for task, head in own.items()}


def travelled(own, rounded):
    return read_heads(record(pack_heads(own, rounded)), shapes(own), rounded)


@pytest.mark.parametrize("rounded", [False, True])
def test_shapes_and_order_of_the_tasks_are_those_that_were_sent(rounded):
    arrays = pack_heads(heads(), rounded)
    assert tasks_in(record(arrays), rounded) == ("skin", "eye")
    found = travelled(heads(), rounded)
    assert shapes(found) == shapes(heads())
    assert all(head.dtype == torch.float32 for head in found.values())


def test_exact_heads_arrive_to_the_bit():
    assert all(torch.equal(head, heads()[task]) for task, head in travelled(heads(), False).items())


def test_rounded_weights_are_within_half_a_step_of_their_row_and_biases_are_exact():
    found = travelled(heads(), True)
    for task, head in heads().items():
        assert torch.equal(found[task][..., -1], head[..., -1])
        largest = head[..., :-1].abs().amax(dim=-1, keepdim=True)
        assert bool(((found[task] - head)[..., :-1].abs() <= 1.0001 * largest / 254).all())
    again = travelled(found, True)
    for task, head in found.items():  # what was rounded once stays, but for float32
        torch.testing.assert_close(again[task], head, rtol=1e-6, atol=0)


def test_a_rounded_head_costs_a_quarter_and_scores_nearly_the_same():
    own = heads()
    size = {rounded: sum(a.nbytes for a in pack_heads(own, rounded).values()) for rounded in (0, 1)}
    assert size[1] < 0.4 * size[0]  # of so short rows scales and biases are a good part
    x = normalize(torch.randn(500, SIZE, generator=seeded("x")), dim=1)
    exact, near = (x @ each["eye"][:, :-1].T for each in (own, travelled(own, True)))
    assert 0 < float((near - exact).std()) < 0.01 * float(exact.std())


def changed(key, change):
    return lambda arrays: {**arrays, key: change(arrays[key])}


def without(key):
    return lambda arrays: {k: v for k, v in arrays.items() if k != key}


BAD = {
    "a label more": (False, changed("eye", lambda a: np.concatenate([a, a[:1]]))),
    "float64": (False, changed("eye", lambda a: a.astype(np.float64))),
    "not finite": (False, changed("eye", lambda a: np.full_like(a, np.nan))),
    "huge": (False, changed("eye", lambda a: np.full_like(a, 1e11))),
    "no biases": (True, without("bias/eye")),
    "no scales": (True, without("eye.scale")),
    "weights of float32": (True, changed("eye", lambda a: a.astype(np.float32))),
    "a row that no code makes": (True, changed("eye", lambda a: a // 2)),
    "a code out of range": (True, changed("eye", lambda a: np.full_like(a, -128))),
    "codes without a scale": (True, changed("eye.scale", lambda a: 0 * a)),
    "one code fewer": (True, changed("eye", lambda a: a[:, :-1])),
    "a negative scale": (True, changed("eye.scale", lambda a: -a)),
    "an infinite scale": (True, changed("eye.scale", lambda a: np.full_like(a, np.inf))),
    "a huge scale": (True, changed("eye.scale", lambda a: np.full_like(a, 1e9))),
    "a huge bias": (True, changed("bias/eye", lambda a: np.full_like(a, -1e11))),
    "a key too many": (True, lambda arrays: {**arrays, "nose": arrays["eye"]}),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_head_is_refused(kind):
    rounded, spoil = BAD[kind]
    spoilt = record(spoil(pack_heads(heads(), rounded)))
    with pytest.raises(PayloadError):
        read_heads(spoilt, shapes(heads()), rounded)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_message_does_not_choose_the_form(rounded):
    with pytest.raises(PayloadError):
        read_heads(record(pack_heads(heads(), not rounded)), shapes(heads()), rounded)
