"""Who is let into a round: lengths beside the others', weights within a cap, entries in reason."""

import gc
import statistics
import weakref

import pytest
import torch

from deal_core.aggregation.rule import BOTH, LORA_B, AggregationFailed, ClientUpdate
from deal_core.aggregation.screen import HELD, Screen, measured, median_without
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.updates import adapter, delta_of, moved_to, replies

pytestmark = pytest.mark.usefixtures("one_thread")
ENTRY = 1e4


def judged(updates, before, entry=ENTRY):
    screen, verdicts = Screen(entry), []
    for update in updates:
        verdicts += screen.add(update, before)
    return verdicts + screen.judged()


def refused(updates, before, entry=ENTRY):
    return [v.update.client for v in judged(updates, before, entry) if v.fault]


def weighing(updates, weights):
    return [ClientUpdate(u.client, u.adapter, w) for u, w in zip(updates, weights, strict=True)]


@pytest.fixture
def start():
    return adapter(torch.Generator().manual_seed(1))


def honest(start, count, trained=BOTH, seed=2):
    return replies(start, trained, torch.Generator().manual_seed(seed), count)


def test_lengths_equal_the_dense_ones(start):
    after = adapter(torch.Generator().manual_seed(3))
    lengths = measured(after, start, 100.0)
    gaps = [(f.A - start.layers[n].A, f.B - start.layers[n].B) for n, f in after.layers.items()]
    flat = torch.cat([part.flatten() for pair in gaps for part in pair])
    assert lengths.factors == pytest.approx(float(flat.norm()), rel=1e-5)
    expected = (delta_of(after) - delta_of(start)).norm()
    assert lengths.product == pytest.approx(float(expected), rel=1e-5)


def test_a_small_change_is_measured_to_the_digit(start):
    """The difference of two long products would have lost it."""
    (far,) = honest(start, 1)
    near = moved_to(far, start, 1e-3)
    layers = {n: LoraFactors(f.A.double(), f.B.double()) for n, f in start.layers.items()}
    exact = moved_to(far, Adapter(layers, start.scaling), 1e-3).adapter
    expected = (delta_of(exact) - delta_of(start)).norm()
    assert measured(near.adapter, start, 100.0).product == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("trained", [BOTH, frozenset({LORA_B})])
@pytest.mark.parametrize("count", [3, 4, 10])
def test_who_is_too_long_stays_out_and_nobody_else(start, trained, count):
    updates = honest(start, count, trained)
    assert refused(updates, start) == []
    for share in (60.0, -60.0):
        updates[1] = moved_to(honest(start, count, trained)[1], start, share)
        assert refused(updates, start) == ["c1"]
    updates[1] = moved_to(honest(start, count, trained)[1], start, 5.0)
    assert refused(updates, start) == []


def test_factors_of_an_ordinary_product_are_measured_too(start):
    """``(A / c, c B)`` is the honest product, and moves a mean of factors as far as it likes."""
    updates = honest(start, 5)
    good = updates[2].adapter
    layers = {n: LoraFactors(f.A / 90, 90 * f.B) for n, f in good.layers.items()}
    updates[2] = ClientUpdate("c2", Adapter(layers, good.scaling), 1.0)
    assert refused(updates, start, 1e9) == ["c2"]
    fault = judged(updates, start, 1e9)[2].fault
    assert "factors" in fault
    assert "median of the others, more than 20" in fault


def test_less_than_half_widen_no_bound_and_narrow_none_to_nothing(start):
    for count, liars in ((3, 1), (4, 1), (5, 2), (9, 4)):
        good = honest(start, count)
        long = [moved_to(u, start, 60.0) if k < liars else u for k, u in enumerate(good)]
        assert refused(long, start) == [f"c{k}" for k in range(liars)]
        still = [moved_to(u, start, 1e-6) if k < liars else u for k, u in enumerate(good)]
        assert refused(still, start) == []


def test_of_two_nobody_can_say_who_is_wrong(start):
    one, two = honest(start, 2)
    assert refused([one, moved_to(two, start, 1e-9)], start) == []
    assert refused([one, moved_to(two, start, 15.0)], start) == []


def test_where_most_did_nothing_there_is_nothing_to_compare_with(start):
    updates = honest(start, 5)
    still = [ClientUpdate(u.client, start, 1.0) for u in updates[:4]]
    assert refused([*still, updates[4]], start) == []


@pytest.mark.parametrize("value", [101.0, -3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_an_entry_beyond_all_reason_is_refused_whoever_else_is_there(start, value, factor):
    layers = {n: LoraFactors(f.A.clone(), f.B.clone()) for n, f in start.layers.items()}
    getattr(layers["v"], factor)[1, 2] += value
    screen = Screen()
    with pytest.raises(AggregationFailed, match="v: an entry changed by more than 100"):
        screen.add(ClientUpdate("eve", Adapter(layers, start.scaling), 1.0), start)
    assert screen.judged() == []


def test_a_weight_is_cut_to_the_cap_and_a_small_one_harms_only_its_own(start):
    updates = weighing(honest(start, 4), (100.0, 120.0, 80.0, 1e7))
    found = judged(updates, start)
    assert [v.update.weight for v in found] == [100.0, 120.0, 80.0, 5000.0]
    assert [v.cut for v in found] == [False, False, False, True]
    found = judged(weighing(honest(start, 2), (1.0, 400.0)), start)
    assert [v.update.weight for v in found] == [1.0, 50.0]
    found = judged(weighing(honest(start, 1), (1e7,)), start)
    assert found[0].update.weight == 1e7
    skewed = weighing(honest(start, 4), (11.0, 9.0, 400.0, 12.0))  # as uneven data really are
    assert not any(v.cut for v in judged(skewed, start))


def test_the_first_are_held_and_then_each_is_judged_as_it_comes(start):
    screen, good = Screen(ENTRY), honest(start, HELD + 4)
    for update in good[:HELD]:
        assert screen.add(update, start) == []
    assert [v.update for v in screen.add(good[HELD], start)] == good[: HELD + 1]
    (late,) = screen.add(moved_to(good[HELD + 1], start, 60.0), start)
    assert late.fault
    gone = weakref.ref(good[0].adapter.layers["q"].A)
    del good, update
    gc.collect()
    assert gone() is None
    assert screen.judged() == []


def test_the_order_of_arrival_decides_nothing_among_those_that_are_held(start):
    updates = weighing(honest(start, 8), (9.0, 7.0, 1e6, 8.0, 10.0, 9.0, 11.0, 9.0))
    updates[5] = moved_to(updates[5], start, 60.0)
    found = {v.update.client: v for v in judged(updates, start)}
    again = {v.update.client: v for v in judged(updates[::-1], start)}
    assert found == again
    assert found["c5"].fault


def test_medians_without_one_equal_those_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 4, 7, 20):
        values = torch.randint(1, 9, (count,), generator=generator).tolist()
        for k, value in enumerate(values):
            rest = values[:k] + values[k + 1 :]
            assert median_without(sorted(values), value) == statistics.median(rest)
