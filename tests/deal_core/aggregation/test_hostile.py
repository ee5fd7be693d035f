"""One hostile client of ten, under every rule with and without the robust step: what it can do is
bounded."""

import math
from dataclasses import replace

import pytest
import torch

from deal_core.aggregation.rule import (
    LORA_A,
    LORA_B,
    AggregationFailed,
    ClientUpdate,
    finished,
    require_finite,
)
from deal_core.aggregation.rules import AGGREGATION_RULES, ROBUST_RULES, make_rule
from deal_core.aggregation.running import fold
from deal_core.aggregation.screen import (
    RELATIVE_BOUND,
    WEIGHT_CAP,
    Screen,
    measured,
)
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.updates import adapter, delta, replies, run

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = sorted(AGGREGATION_RULES)
EXACT = sorted(set(RULES) - {"fedit"})


def valued(change):
    """Change the trained factors of an update."""

    def spoil(update, trained):
        layers = {
            n: LoraFactors(
                change(f.A) if LORA_A in trained else f.A, change(f.B) if LORA_B in trained else f.B
            )
            for n, f in update.adapter.layers.items()
        }
        return replace(update, adapter=Adapter(layers, update.adapter.scaling))

    return spoil


def alternating(value):
    def change(factor):
        signs = torch.ones(factor.numel())
        signs[1::2] = -1.0
        return value * signs.view(factor.shape)

    return change


def one_entry(value):
    def change(factor):
        factor = factor.clone()
        factor[0, 0] = value
        return factor

    return change


REFUSED = {
    "a million times": valued(lambda x: 1e6 * x),
    "3e38": valued(lambda x: torch.full_like(x, 3e38)),
    "-3e38": valued(lambda x: torch.full_like(x, -3e38)),
    "alternating 3e38": valued(alternating(3e38)),
    "one entry of 3e38": valued(one_entry(3e38)),
    "1e20": valued(lambda x: torch.full_like(x, 1e20)),
    "a hundred times": valued(lambda x: 100 * x),
}
BOUNDED = {
    "1e-45": valued(lambda x: torch.full_like(x, 1e-45)),
    "zero": valued(torch.zeros_like),
    "alternating ones": valued(alternating(1.0)),
    "turned": valued(lambda x: -x),
    "twice": valued(lambda x: 2 * x),
    "a vast weight": lambda update, trained: replace(update, weight=1e7),
    "minus twice, with a vast weight": lambda update, trained: replace(
        valued(lambda x: -2 * x)(update, trained), weight=1e7
    ),
}
SPOILT = REFUSED | BOUNDED


def federation(rule, seed=3):
    generator = torch.Generator().manual_seed(seed)
    before = adapter(generator)
    trained = make_rule(AggregationConfig(rule=rule)).trained
    updates = replies(before, trained, generator, 10)
    return before, trained, [replace(u, weight=10.0 + k) for k, u in enumerate(updates)]


def screened(updates, before):
    screen, verdicts = Screen(), []
    for update in updates:
        try:
            verdicts += screen.add(update, before)
        except AggregationFailed:
            continue
    return [v.update for v in (*verdicts, *screen.judged()) if not v.fault]


@pytest.mark.parametrize("robust", sorted(ROBUST_RULES))
@pytest.mark.parametrize("rule", RULES)
def test_without_a_screen_a_round_is_finite_or_fails_by_name(rule, robust):
    before, trained, updates = federation(rule)
    for kind, spoil in SPOILT.items():
        aggregation = make_rule(AggregationConfig(rule=rule, robust=robust)).begin(before)
        for update in (*updates[:4], spoil(updates[4], trained), *updates[5:]):
            aggregation.add(update)
        try:
            result = finished(aggregation)
        except AggregationFailed:
            assert kind in REFUSED
            continue
        require_finite(kind, result.current)
        require_finite(kind, result.residual)
        assert math.isfinite(result.error)


@pytest.mark.parametrize("robust", sorted(ROBUST_RULES))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", REFUSED)
def test_who_is_refused_leaves_the_aggregate_of_the_others_to_the_bit(rule, robust, kind):
    before, trained, updates = federation(rule)
    others = updates[:4] + updates[5:]
    bad = [*updates[:4], REFUSED[kind](updates[4], trained), *updates[5:]]
    assert screened(bad, before) == others
    result = run(screened(bad, before), before, rule=rule, robust=robust)
    expected = run(others, before, rule=rule, robust=robust)
    assert torch.equal(delta(result), delta(expected))


@pytest.mark.parametrize("robust", sorted(ROBUST_RULES))
@pytest.mark.parametrize("rule", EXACT)
@pytest.mark.parametrize("kind", BOUNDED)
def test_who_is_let_in_moves_the_model_by_no_more_than_the_bounds_say(rule, robust, kind):
    """In a mean: the share that a capped weight buys, times the longest update that is let in and
    the longest of the others. The robust step may trade an honest update for this one."""
    before, trained, updates = federation(rule)
    others = updates[:4] + updates[5:]
    bad = [*updates[:4], BOUNDED[kind](updates[4], trained), *updates[5:]]
    let_in = screened(bad, before)
    assert len(let_in) == 10
    lengths = sorted(measured(u.adapter, before, 100.0).product for u in others)
    middle = lengths[len(lengths) // 2]
    weights = sorted(u.weight for u in others)
    heaviest = WEIGHT_CAP * weights[len(weights) // 2]
    share = heaviest / (heaviest + sum(weights)) if robust == "none" else 1.0
    result = run(let_in, before, rule=rule, robust=robust)
    expected = run(others, before, rule=rule, robust=robust)
    moved = float((delta(result) - delta(expected)).norm())
    assert moved <= share * (RELATIVE_BOUND * middle + lengths[-1]) * (1 + 1e-4)


@pytest.mark.parametrize("kind", BOUNDED)
def test_means_of_factors_are_moved_within_the_same_bounds(kind):
    before, trained, updates = federation("fedit")
    others = updates[:4] + updates[5:]
    bad = [*updates[:4], BOUNDED[kind](updates[4], trained), *updates[5:]]
    lengths = sorted(measured(u.adapter, before, 100.0).factors for u in others)
    result = run(screened(bad, before), before, rule="fedit").current
    expected = run(others, before, rule="fedit").current
    moved = measured(result, expected, 100.0).factors
    assert moved <= RELATIVE_BOUND * lengths[len(lengths) // 2] + lengths[-1]


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_an_update_that_fails_in_the_middle_leaves_the_round_as_it_was(rule, monkeypatch):
    """The sum of one layer is folded when it is full; here that fails, in the second layer."""
    before, _, updates = federation(rule)
    clean = make_rule(AggregationConfig(rule=rule)).begin(before)
    shaken = make_rule(AggregationConfig(rule=rule)).begin(before)
    calls = []

    def failing(factors):
        calls.append(factors)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("ill-conditioned")
        return fold(factors)

    for k, update in enumerate(updates):
        if k == 6:  # six of rank 3 wait: the seventh is too many for a layer of side 9 or 10
            monkeypatch.setattr("deal_core.aggregation.running.fold", failing)
            eve = ClientUpdate("eve", updates[0].adapter, 5.0)
            with pytest.raises(torch.linalg.LinAlgError):
                shaken.add(eve)
            monkeypatch.undo()
        clean.add(update)
        shaken.add(update)
    assert len(calls) == 2
    one, two = finished(shaken), finished(clean)
    assert torch.equal(delta(one), delta(two))
    assert one.error == two.error


@pytest.mark.parametrize("part", ["current", "residual"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_aggregate_that_is_not_finite_is_none(part, value):
    before, _, updates = federation("fedex")
    good = run(updates, before, rule="fedex")
    spoilt = getattr(good, part)
    spoilt.layers["v"].B[0, 0] = float(value)

    class Round:
        def finish(self):
            return good

    with pytest.raises(AggregationFailed, match=r"not finite \(v\)"):
        finished(Round())


def test_an_aggregate_that_cannot_be_computed_is_none():
    class Round:
        def finish(self):
            raise torch.linalg.LinAlgError("ill-conditioned")

    with pytest.raises(AggregationFailed, match="LinAlgError: ill-conditioned"):
        finished(Round())
