"""The secure sum is the plain sum, bit for bit, whoever drops out within the threshold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.secure_sum.layout import Layout, SumField
from deal_core.secure_sum.messages import BelowThreshold
from deal_core.secure_sum.server_round import unmasked_sum
from tests.deal_core.secure_sum.rounds import (
    EXCHANGES,
    Round,
    first,
    integers,
    met,
    plain_sum,
    terms_of,
    vectors,
)
from tests.slow import slow_but

FEW, SITES = 12, 50


def survivors_sum(round_):
    gone = {*round_.absent.get("prepare", ()), *round_.absent.get("mask", ())}
    sites = [site for at, site in enumerate(round_.terms.cohort) if at not in gone]
    return plain_sum(round_.encoded, sites)


def a_round(sites, absent=None, bits=32, length=5, **changed):
    states = first(met(FEW if sites <= FEW else SITES), sites)
    layout = integers(length, sites, bits)
    return Round(terms_of(states, layout, **changed), states, vectors(states, layout), absent or {})


@pytest.mark.parametrize("sites", slow_but([*range(2, 18), 23, 31, 50], 2, 3, 4, 7, 10))
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_as_many_may_drop_out_as_the_threshold_allows_in_any_exchange(sites, exchange):
    most = (sites - 1) // 2
    for dropped in {0, 1, most} if sites < 18 else {most}:
        round_ = a_round(sites, {exchange: range(min(dropped, most))})
        assert round_.terms.threshold == sites - most
        assert np.array_equal(round_.total(), survivors_sum(round_))


@pytest.mark.slow
@pytest.mark.parametrize("sites", range(2, SITES + 1))
def test_any_number_may_drop_out_up_to_the_threshold_before_and_after_masking(sites):
    """All numbers of 2 to 50 sites, none left out; who they are is drawn at random.

    Rounds with the same past share it: all that prepare, all that mask.
    """
    order = np.random.default_rng(sites).permutation(sites).tolist()
    prepared = a_round(sites).until("mask")
    masked = prepared.forked({})
    masked.mask()
    for dropped in range((sites - 1) // 2 + 1):
        before = prepared.forked({"mask": order[:dropped]})
        assert np.array_equal(before.total("mask"), survivors_sum(before))
        assert len(before.held.survivors or ()) == sites - dropped
        after = masked.forked({"confirm": order[:dropped]})
        assert np.array_equal(after.total("confirm"), plain_sum(after.encoded, list(after.states)))
        assert len(after.held.unmasked) == sites - dropped


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_whoever_is_gone_in_whichever_exchange(data):
    sites = data.draw(st.integers(2, 12))
    most = (sites - 1) // 2
    gone = data.draw(st.lists(st.integers(0, sites - 1), unique=True, max_size=most))
    exchanges = st.sampled_from(EXCHANGES)
    absent = {}
    for position in gone:
        absent.setdefault(data.draw(exchanges), []).append(position)
    round_ = a_round(sites, absent, data.draw(st.sampled_from([32, 64])))
    assert np.array_equal(round_.total(), survivors_sum(round_))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("sites", [3, 4, 9])
def test_below_the_threshold_there_is_no_sum(sites, exchange):
    round_ = a_round(sites, {exchange: range((sites - 1) // 2 + 1)})
    with pytest.raises(BelowThreshold, match=r"below .* the round ends without"):
        round_.total()


def test_who_may_collude_raises_the_threshold():
    for sites in range(2, 60):
        for colluding in range(sites - 1):
            threshold = terms_of(
                {bytes([k]) * 32: None for k in range(sites)}, integers(1, sites),
                colluding=colluding,
            ).threshold  # fmt: skip
            assert 2 * threshold > sites + colluding >= 2 * (threshold - 1)
            assert threshold <= sites
    round_ = a_round(10, {"mask": range(3)}, colluding=3)
    assert round_.terms.threshold == 7
    assert np.array_equal(round_.total(), survivors_sum(round_))
    with pytest.raises(BelowThreshold):
        a_round(10, {"mask": range(4)}, colluding=3).total()


def test_sums_at_the_edge_of_the_ring_come_back_with_their_sign():
    for bits in (32, 64):
        states = first(met(FEW), 4)
        largest = ((1 << (bits - 1)) - 1) // 4
        layout = Layout((SumField("x", (2,), largest),), bits, 4)
        generator = np.random.default_rng(0)
        encoded = {site: layout.encode({"x": [largest, -largest]}, generator) for site in states}
        total = layout.decode(Round(terms_of(states, layout), states, encoded).total())
        assert total["x"].tolist() == [4 * largest, -4 * largest]


def test_rounds_follow_one_another_and_prepare_rides_with_unmask():
    states = first(met(FEW), 5)
    layout = integers(4, 5)
    old = Round(terms_of(states, layout, 1), states, vectors(states, layout, 1)).until("unmask")
    new = Round(terms_of(states, layout, 2), old.states, vectors(states, layout, 2))
    new.prepare()
    old.states = new.states
    old.unmask()
    new.states = old.states
    assert np.array_equal(unmasked_sum(old.held), survivors_sum(old))
    new.mask(), new.confirm(), new.unmask()
    assert np.array_equal(unmasked_sum(new.held), survivors_sum(new))
