"""Robust steps: equal to Flower's where the same is meant, on factors and on products."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_median, aggregate_trimmed_avg
from flwr.serverapp.strategy.multikrum import select_multikrum

from deal_core.aggregation import (
    AGGREGATION_RULES,
    BOTH,
    LORA_A,
    LORA_B,
    ROBUST_RULES,
    ClientUpdate,
    make_rule,
)
from deal_core.aggregation.krum import multi_krum, squared_distances
from deal_core.aggregation.robust import RoundStart, median, trimmed_mean
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.dense import weight_delta
from tests.deal_core.aggregation.updates import (
    SHAPES,
    adapter,
    delta,
    replies,
    run,
    spoiled,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(update):
    return [x.numpy() for f in update.adapter.layers.values() for x in (f.A, f.B)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10])
@pytest.mark.parametrize("trained", [BOTH, frozenset({LORA_B}), frozenset({LORA_A})])
def test_median_equals_flowers(count, trained):
    generator = torch.Generator().manual_seed(count)
    before = adapter(generator)
    updates = replies(before, trained, generator, count)
    (one,) = median(updates, RoundStart(before, trained)).updates
    expected = aggregate_median([(arrays(u), 1) for u in updates])
    for ours, theirs in zip(arrays(one), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("count", "fraction"), [(5, 0.2), (10, 0.2), (10, 0.4), (4, 0.0)])
def test_trimmed_mean_equals_flowers_where_the_share_is_whole(count, fraction):
    generator = torch.Generator().manual_seed(count)
    before = adapter(generator)
    updates = replies(before, BOTH, generator, count)
    (one,) = trimmed_mean(updates, RoundStart(before, BOTH), fraction).updates
    expected = aggregate_trimmed_avg([(arrays(u), 1) for u in updates], fraction)
    for ours, theirs in zip(arrays(one), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_trimmed_mean_rounds_the_cut_up():
    generator = torch.Generator().manual_seed(0)
    before = adapter(generator)
    updates, start = replies(before, BOTH, generator, 4), RoundStart(before, BOTH)
    (one,) = trimmed_mean(updates, start, 0.2).updates
    (middle,) = median(updates, start).updates  # one of four cut at each end: the middle two
    torch.testing.assert_close(one.adapter.layers["q"].A, middle.adapter.layers["q"].A)
    with pytest.raises(ValueError, match="leaves none"):
        trimmed_mean(updates[:2], start, 0.2)


@pytest.mark.parametrize(("count", "bad", "keep"), [(6, 1, 0), (9, 2, 0), (10, 3, 1), (7, 0, 3)])
def test_multi_krum_keeps_whom_flower_keeps_when_one_factor_is_common(count, bad, keep):
    trained = frozenset({LORA_B})
    generator = torch.Generator().manual_seed(count)
    before = adapter(generator)
    updates = replies(before, trained, generator, count)
    updates[1] = spoiled(updates[1], "scaled")
    kept = {u.client for u in multi_krum(updates, RoundStart(before, trained), bad, keep).updates}
    contents = [
        RecordDict(
            {"arrays": ArrayRecord(arrays(u)), "name": MetricRecord({"k": k, "num-examples": 1})}
        )
        for k, u in enumerate(updates)
    ]
    chosen = select_multikrum(contents, bad, keep or count - bad)
    assert kept == {updates[c["name"]["k"]].client for c in chosen}


def test_distances_between_products_equal_the_dense_ones():
    generator = torch.Generator().manual_seed(1)
    adapters = [adapter(generator, rank, 8.0 / rank) for rank in (1, 2, 4, 8, 8, 400, 300)]
    distances = squared_distances(adapters, BOTH)
    for i, j in combinations(range(len(adapters)), 2):
        dense = sum(
            (
                weight_delta(adapters[i].layers[n], adapters[i].scaling, False)
                - weight_delta(adapters[j].layers[n], adapters[j].scaling, False)
            )
            .square()
            .sum()
            for n in SHAPES
        )
        assert float(distances[i, j]) == pytest.approx(float(dense), rel=1e-4)
        assert distances[i, j] == pytest.approx(distances[j, i])


def test_distances_do_not_depend_on_how_a_client_factors_its_product():
    generator = torch.Generator().manual_seed(2)
    one, other = adapter(generator), adapter(generator)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    rotated = Adapter(
        {n: LoraFactors(mix.T @ f.A, f.B @ mix) for n, f in one.layers.items()}, one.scaling
    )
    distances = squared_distances([one, rotated, other], BOTH)
    assert distances[0, 1] < 1e-5 * distances[0, 2]


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "multi-krum", "cosine-norm"])
@pytest.mark.parametrize("kind", ["flipped", "scaled"])
@pytest.mark.parametrize("rule", sorted(AGGREGATION_RULES))
def test_two_bad_of_ten_do_not_carry_the_round(rule, robust, kind):
    generator = torch.Generator().manual_seed(3)
    before = adapter(generator)
    trained = make_rule(AggregationConfig(rule=rule)).trained(1)
    clean = replies(before, trained, generator, 10)
    bad = [spoiled(u, kind) if k in (2, 7) else u for k, u in enumerate(clean)]
    target = delta(run(clean, before, rule=rule))
    plain = delta(run(bad, before, rule=rule))
    options = {"robust": robust, "num_malicious": 2, "trim_fraction": 0.2}
    guarded = run(bad, before, rule=rule, **options)
    assert (plain - target).norm() > 0.5 * target.norm()
    assert (delta(guarded) - target).norm() < 0.2 * target.norm()
    assert guarded.error > 0.1  # far from the mean of all, which is what it is for
    names_them = robust in ("multi-krum", "cosine-norm")
    assert guarded.excluded == (("c2", "c7") if names_them else ())


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "multi-krum", "cosine-norm"])
@pytest.mark.parametrize("rule", sorted(AGGREGATION_RULES))
def test_order_of_clients_and_equal_clients(rule, robust):
    generator = torch.Generator().manual_seed(4)
    before = adapter(generator)
    trained = make_rule(AggregationConfig(rule=rule)).trained(1)
    updates = replies(before, trained, generator, 6, size=0.5)
    options = {"rule": rule, "robust": robust}
    first, second = run(updates, before, **options), run(updates[::-1], before, **options)
    assert (delta(first) - delta(second)).norm() < 1e-6 * delta(first).norm()
    assert sorted(first.excluded) == sorted(second.excluded)
    same = [ClientUpdate(f"c{k}", updates[0].adapter, 1.0) for k in range(5)]
    result = run(same, before, **options)
    assert result.error < 1e-6


def test_multi_krum_takes_mixed_ranks_and_the_others_refuse_them():
    generator = torch.Generator().manual_seed(5)
    before = adapter(generator, rank=8)
    one = adapter(generator, rank=2)
    for robust in ("median", "trimmed-mean"):
        rule = make_rule(AggregationConfig(rule="flexlora", robust=robust))
        assert not rule.mixed_ranks
        with pytest.raises(ValueError, match="client eve"):
            rule.begin(before, 1).add(ClientUpdate("eve", one, 1.0))
    rule = make_rule(AggregationConfig(rule="flexlora", robust="multi-krum"))
    assert rule.mixed_ranks
    aggregation = rule.begin(before, 1)
    for k, rank in enumerate((2, 4, 8, 4, 2)):
        aggregation.add(ClientUpdate(f"c{k}", adapter(generator, rank, 8.0 / rank), 1.0))
    assert len(aggregation.finish().excluded) == 1


@pytest.mark.parametrize("name", sorted(ROBUST_RULES))
def test_too_few_clients(name):
    generator = torch.Generator().manual_seed(6)
    before = adapter(generator)
    aggregation = make_rule(AggregationConfig(rule="ffa", robust=name)).begin(before, 1)
    with pytest.raises(ValueError, match="no client update"):
        aggregation.finish()
    with pytest.raises(ValueError, match="f \\+ 3"):
        multi_krum(replies(before, BOTH, generator, 3), RoundStart(before, BOTH), 1)


def test_robust_rules_ignore_weights_where_they_say_so():
    generator = torch.Generator().manual_seed(7)
    before = adapter(generator)
    updates, start = replies(before, BOTH, generator, 5), RoundStart(before, BOTH)
    heavy = [
        ClientUpdate(u.client, u.adapter, 1e6 if k == 0 else 1.0) for k, u in enumerate(updates)
    ]
    for step in (median, partial(trimmed_mean, fraction=0.2)):
        (one,), (two,) = step(updates, start).updates, step(heavy, start).updates
        assert torch.equal(one.adapter.layers["q"].A, two.adapter.layers["q"].A)
