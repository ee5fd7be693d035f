"""Wire codecs: round trips, unbiased rounding, error feedback, refusal of everything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deal_core.lora.payload import PREFIX, PayloadError, Template
from deal_core.wire.codec import (
    CODECS,
    decode,
    encode,
    encode_with_feedback,
    expected_headers,
    select,
)

TEMPLATE = Template({"q": (6, 5), "layer.v": (4, 4)}, 3)
BOTH = frozenset({"lora_A", "lora_B"})
ONLY_B = frozenset({"lora_B"})
KEY = f"{PREFIX}q.lora_B.weight"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(trained=BOTH, seed=0, template=TEMPLATE):
    rng = np.random.default_rng(seed)
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in template.expected().items()}
    return select(arrays, trained)


def matrices(low, high):
    finite = st.floats(low, high, width=32)
    shape = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
    return hnp.arrays(np.float32, shape, elements=finite)


def one(codec, array, factor, seed=0):
    """Send one array as the given factor of a layer."""
    rank = array.shape[0] if factor == "lora_A" else array.shape[1]
    shape = (2, array.shape[1]) if factor == "lora_A" else (array.shape[0], 2)
    template, key = Template({"q": shape}, rank), f"{PREFIX}q.{factor}.weight"
    encoded = encode(CODECS[codec], {key: array}, generator(seed))
    return decode(CODECS[codec], encoded, template, frozenset({factor}))[key]


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("trained", [BOTH, ONLY_B, frozenset({"lora_A"})])
def test_only_the_trained_factors_travel_and_come_back(codec, trained):
    arrays = sample(trained)
    encoded = encode(CODECS[codec], arrays, generator())
    decoded = decode(CODECS[codec], encoded, TEMPLATE, trained)
    assert decoded.keys() == arrays.keys()
    for key, array in arrays.items():
        assert decoded[key].dtype == np.float32
        np.testing.assert_allclose(decoded[key], array, atol=np.abs(array).max() / 127)
    assert sum(array.nbytes for array in encoded.values()) == sum(
        h.nbytes for h in expected_headers(CODECS[codec], TEMPLATE, trained).values()
    )


@given(matrices(-(2.0**127), 2.0**127))
@settings(deadline=None, derandomize=True)
def test_float32_is_exact(array):
    assert np.array_equal(one("float32", array, "lora_A"), array)


@given(matrices(-(2.0**126), 2.0**126))
@settings(deadline=None, derandomize=True)
def test_bfloat16_rounds_as_torch_does(array):
    expected = torch.from_numpy(array.copy()).bfloat16().float().numpy()
    assert np.array_equal(one("bfloat16", array, "lora_B"), expected)


@given(matrices(-(2.0**120), 2.0**120), st.sampled_from(["lora_A", "lora_B"]))
@settings(deadline=None, derandomize=True)
def test_int8_is_off_by_less_than_one_step_of_its_rank_direction(array, factor):
    axis = 1 if factor == "lora_A" else 0
    step = np.abs(array).max(axis=axis, keepdims=True).astype(np.float64) / 127
    gap = np.abs(one("int8", array, factor).astype(np.float64) - array)
    assert (gap <= 1.001 * step + 1e-37).all()


def test_stochastic_rounding_is_unbiased():
    array = sample(ONLY_B)[KEY]
    step = np.abs(array).max(axis=0) / 127
    draws = 4000
    mean = np.mean([one("int8", array, "lora_B", seed) for seed in range(draws)], axis=0)
    assert (np.abs(mean - array) < 5 * (step / 2) / np.sqrt(draws) + 1e-6).all()


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
def test_error_feedback_makes_the_average_over_rounds_exact(codec):
    residual, total_in, total_out = {}, 0.0, 0.0
    source = generator()
    for seed in range(200):
        arrays = sample(ONLY_B, seed)
        encoded, residual = encode_with_feedback(CODECS[codec], arrays, residual, source)
        decoded = decode(CODECS[codec], encoded, TEMPLATE, ONLY_B)
        total_in, total_out = total_in + arrays[KEY], total_out + decoded[KEY]
    assert np.abs(residual[KEY]).max() < 5 / 64
    np.testing.assert_allclose(total_in - total_out, residual[KEY], atol=2e-4)
    assert (np.abs(total_in - total_out) / 200).max() < 5e-4


MUTATIONS = {
    "extra key": lambda m: {**m, "model.weight": m[KEY]},
    "missing key": lambda m: {k: v for k, v in m.items() if k != KEY},
    "empty": lambda m: {},
    "renamed key": lambda m: {k + "x" if k == KEY else k: v for k, v in m.items()},
    "number as key": lambda m: {**m, 3: m[KEY]},
    "float64": lambda m: {**m, KEY: m[KEY].astype(np.float64)},
    "int32": lambda m: {**m, KEY: m[KEY].astype(np.int32)},
    "other byte order": lambda m: {**m, KEY: m[KEY].astype(">f4")},
    "object": lambda m: {**m, KEY: m[KEY].astype(object)},
    "strings": lambda m: {**m, KEY: m[KEY].astype(str)},
    "complex": lambda m: {**m, KEY: m[KEY].astype(np.complex64)},
    "boolean": lambda m: {**m, KEY: m[KEY].astype(bool)},
    "structured": lambda m: {**m, KEY: np.zeros((6, 3), [("a", "f4")])},
    "transposed": lambda m: {**m, KEY: m[KEY].T},
    "broadcastable": lambda m: {**m, KEY: m[KEY][:1]},
    "truncated": lambda m: {**m, KEY: m[KEY].ravel()[:-1]},
    "flat": lambda m: {**m, KEY: m[KEY].ravel()},
    "extra axis": lambda m: {**m, KEY: m[KEY][None]},
    "scalar": lambda m: {**m, KEY: np.array(m[KEY][0, 0])},
    "no elements": lambda m: {**m, KEY: m[KEY][:0]},
    "huge": lambda m: {**m, KEY: np.zeros((6, 3000), m[KEY].dtype)},
    "bytes": lambda m: {**m, KEY: m[KEY].tobytes()},
    "list": lambda m: {**m, KEY: m[KEY].tolist()},
    "none": lambda m: {**m, KEY: None},
    "tensor": lambda m: {**m, KEY: torch.zeros(6, 3)},
}


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_a_mutated_message_is_refused(codec, mutation):
    message = MUTATIONS[mutation](encode(CODECS[codec], sample(ONLY_B), generator()))
    with pytest.raises(PayloadError):
        decode(CODECS[codec], message, TEMPLATE, ONLY_B)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("other", sorted(CODECS))
@pytest.mark.parametrize("trained", [BOTH, ONLY_B, frozenset({"lora_A"})])
def test_another_codec_or_other_factors_are_refused(codec, other, trained):
    message = encode(CODECS[codec], sample(ONLY_B), generator())
    if (codec, trained) == (other, ONLY_B):
        decode(CODECS[other], message, TEMPLATE, trained)
    else:
        with pytest.raises(PayloadError):
            decode(CODECS[other], message, TEMPLATE, trained)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_neither_sent_nor_taken(codec, value):
    arrays = sample(ONLY_B)
    message = encode(CODECS[codec], arrays, generator())
    arrays[KEY][2, 1] = value
    with pytest.raises(PayloadError, match="not finite"):
        encode(CODECS[codec], arrays, generator())
    bits = {
        "float32": (KEY, np.float32(value)),
        "bfloat16": (KEY, np.float32(value).view(np.uint32) >> 16),
        "int8": (KEY + ".scale", np.float32(value)),
    }
    key, bad = bits[codec]
    message[key] = message[key].copy()
    message[key].ravel()[1] = bad
    with pytest.raises(PayloadError, match="finite"):
        decode(CODECS[codec], message, TEMPLATE, ONLY_B)


def test_int8_refuses_codes_and_scales_that_nobody_sends():
    message = encode(CODECS["int8"], sample(ONLY_B), generator())
    low, negative, over = ({k: v.copy() for k, v in message.items()} for _ in range(3))
    low[KEY][0, 0] = -128
    negative[KEY + ".scale"][0] = -1.0
    over[KEY + ".scale"][0] = 3e38
    for bad in (low, negative, over):
        with pytest.raises(PayloadError):
            decode(CODECS["int8"], bad, TEMPLATE, ONLY_B)


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_bytes_in_place_of_an_array_never_pass_as_something_else(data):
    """Whatever the codes, the decoded tensors are finite and of the expected shape, or refused."""
    codec = data.draw(st.sampled_from(sorted(CODECS)))
    headers = expected_headers(CODECS[codec], TEMPLATE, ONLY_B)
    message = {
        key: np.frombuffer(
            data.draw(st.binary(min_size=h.nbytes, max_size=h.nbytes)), h.dtype
        ).reshape(h.shape)
        for key, h in headers.items()
    }
    try:
        decoded = decode(CODECS[codec], message, TEMPLATE, ONLY_B)
    except PayloadError:
        return
    for key, array in decoded.items():
        assert array.shape == TEMPLATE.expected()[key]
        assert np.isfinite(array).all()


@pytest.mark.parametrize("dtype", sorted(CODECS))
def test_what_was_decoded_is_encoded_again_to_the_bit(dtype):
    """A retained adapter is sent in every round: it must not wander, and clients know what they
    keep by its values."""
    codec, draw = CODECS[dtype], generator()
    for size in (1e-4, 0.03, 5.0):
        for key, shape in (("l.lora_A.weight", (64, 4096)), ("l.lora_B.weight", (4096, 64))):
            drawn = size * torch.randn(shape, generator=draw).numpy()
            sent = codec.decode(key, codec.encode(key, drawn, draw))
            for _ in range(10):
                again = codec.decode(key, codec.encode(key, sent, draw))
                assert np.array_equal(again, sent)
