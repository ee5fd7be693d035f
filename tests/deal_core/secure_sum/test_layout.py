"""Numbers become ring words without bias; what could leave the ring is refused before."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deal_core.secure_sum.layout import Layout, SumField, finest_scale, round_at_random
from deal_core.secure_sum.messages import ProtocolError

GENERATOR = np.random.default_rng(3)


@settings(max_examples=60)
@given(
    st.floats(1e-6, 1e6), st.integers(1, 100), st.sampled_from([32, 64]),
    arrays(np.float64, 4, elements=st.floats(-1, 1)),
)  # fmt: skip
def test_the_finest_grid_fits_and_the_next_does_not(largest, sites, bits, unit):
    scale = finest_scale(largest, sites, bits)
    layout = Layout((SumField("x", (4,), largest, scale),), bits, sites)
    assert math.frexp(scale)[0] == 0.5
    with pytest.raises(ProtocolError, match="can leave a ring"):
        Layout((SumField("x", (4,), largest, 2 * scale),), bits, sites)
    values = unit * largest
    words = layout.encode({"x": values}, GENERATOR).words
    decoded = layout.decode(words)["x"]
    assert np.abs(decoded - values).max() <= 1 / scale
    # All sites at the same value: the sum is that many times the decoded one, to the last bit.
    total = np.sum([words] * sites, axis=0, dtype=words.dtype)
    assert np.array_equal(layout.decode(total)["x"] * scale, decoded * scale * sites)


def test_rounding_has_the_value_as_its_mean():
    values = np.repeat([0.25, -0.75, 3.5, 7.0, -2.0], 40_000)
    rounded = round_at_random(values, np.random.default_rng(5)).reshape(5, -1)
    assert np.all(np.abs(rounded - values.reshape(5, -1)) < 1)
    # Four standard deviations of a fair coin.
    assert np.abs(rounded.mean(axis=1) - values[::40_000]).max() < 4 * 0.5 / math.sqrt(40_000)
    assert np.array_equal(rounded[3:], np.repeat([[7], [-2]], 40_000, axis=1))


def test_large_numbers_are_not_moved_by_rounding():
    # Above 2^53 a float64 is an integer; adding a uniform number first would move it.
    values = np.array([2.0**54 + 4, -(2.0**60) - 256])
    assert round_at_random(values, GENERATOR).tolist() == [2**54 + 4, -(2**60) - 256]


@pytest.mark.parametrize(
    "value", [1.5, -1.5, math.nan, math.inf, -math.inf, np.nextafter(1.0, 2.0)]
)
def test_out_of_bounds_is_refused_and_no_value_is_named(value):
    layout = Layout((SumField("x", (2,), 1.0, 1024.0),), 32, 3)
    with pytest.raises(ProtocolError, match="out of its bound") as refusal:
        layout.encode({"x": [0.0, value]}, GENERATOR)
    assert str(value) not in str(refusal.value)


def test_integers_pass_as_they_are_and_floats_do_not_pass_as_integers():
    layout = Layout((SumField("n", (3,), 10),), 64, 5)
    decoded = layout.decode(layout.encode({"n": [10, -10, 0]}, GENERATOR).words)["n"]
    assert decoded.tolist() == [10, -10, 0]
    assert decoded.dtype == np.int64
    for values, line in (([1.0, 2.0, 3.0], "integers alone"), ([11, 0, 0], "out of its bound")):
        with pytest.raises(ProtocolError, match=line):
            layout.encode({"n": values}, GENERATOR)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "other fields"),
        ({"x": [1.0]}, "another shape"),
        ({"x": [0, 0], "y": 1}, "other fields"),
    ],
)
def test_other_arrays_than_those_of_the_layout(values, line):
    with pytest.raises(ProtocolError, match=line):
        Layout((SumField("x", (2,), 1.0, 8.0),), 32, 3).encode(values, GENERATOR)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ((SumField("x", (), 2**30),), "can leave a ring"),
        ((SumField("x", (), math.inf, 1.0),), "no usable number"),
        ((SumField("x", (), -1.0),), "no usable number"),
        ((SumField("x", (), 1.0, 0.0),), "no usable number"),
        ((SumField("x", (), 1.0), SumField("x", (2,), 1.0)), "a field twice"),
    ],
)
def test_layouts_that_cannot_be(fields, line):
    with pytest.raises(ProtocolError, match=line):
        Layout(fields, 32, 2)


def test_the_digest_changes_with_everything():
    field = SumField("x", (2,), 1.0, 8.0)
    layouts = [
        Layout((field,), 32, 3),
        Layout((field,), 32, 4),
        Layout((field,), 64, 3),
        Layout((SumField("y", (2,), 1.0, 8.0),), 32, 3),
        Layout((SumField("x", (1, 2), 1.0, 8.0),), 32, 3),
        Layout((SumField("x", (2,), 1.0, 4.0),), 32, 3),
        Layout((SumField("x", (2,), 1.0),), 32, 3),
        Layout((field,), 32, 3, "told"),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert Layout((SumField("x", (2,), 1, 8),), 32, 3).digest == layouts[0].digest


def test_a_sum_of_another_layout_is_refused():
    layout = Layout((SumField("x", (2,), 1.0, 8.0),), 32, 3)
    for total in (np.zeros(3, "<u4"), np.zeros(2, "<u8")):
        with pytest.raises(ProtocolError, match="a sum has not"):
            layout.decode(total)


@pytest.mark.parametrize("largest", [0.0, math.nan])
def test_a_bound_that_is_none_has_no_grid(largest):
    with pytest.raises(ProtocolError, match="positive and finite"):
        finest_scale(largest, 3, 32)
