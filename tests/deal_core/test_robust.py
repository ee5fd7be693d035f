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

from deal_core.adapters import Adapter, LoraFactors
from deal_core.aggregation import (
    AGGREGATION_RULES,
    BOTH,
    LORA_A,
    LORA_B,
    ROBUST_RULES,
    ClientUpdate,
    change_norms,
    clip_to,
    make_rule,
    refuse_beyond,
    weight_delta,
)
from deal_core.aggregation.direction import LONGEST, direction, inner
from deal_core.aggregation.krum import multi_krum, squared_distances
from deal_core.aggregation.robust import RoundStart, median, trimmed_mean
from deal_core.config import AggregationConfig
from deal_core.payload import PayloadError

SHAPES = {"q": (10, 12), "v": (9, 9)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapter(generator, rank=3, scaling=2.0, size=1.0):
    layers = {
        name: LoraFactors(
            size * torch.randn(rank, d_in, generator=generator),
            size * torch.randn(d_out, rank, generator=generator),
        )
        for name, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(layers, scaling)


def replies(before, trained, generator, count, size=0.1):
    """Clients that agree on a direction and differ by noise."""
    common, updates = adapter(generator), []
    for k in range(count):
        noise = adapter(generator, size=size)
        layers = {}
        for name, start in before.layers.items():
            step, own = common.layers[name], noise.layers[name]
            layers[name] = LoraFactors(
                start.A + step.A + own.A if LORA_A in trained else start.A,
                start.B + step.B + own.B if LORA_B in trained else start.B,
            )
        updates.append(ClientUpdate(f"c{k}", Adapter(layers, before.scaling), 1.0 + k))
    return updates


def arrays(update):
    return [x.numpy() for f in update.adapter.layers.values() for x in (f.A, f.B)]


def spoiled(update, kind):
    sign = {"flipped": -4.0, "scaled": 50.0}[kind]
    layers = {n: LoraFactors(f.A, sign * f.B) for n, f in update.adapter.layers.items()}
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


def delta(result):
    parts = [result.current] + ([result.residual] if result.residual else [])
    return torch.cat(
        [
            sum(weight_delta(p.layers[name], p.scaling, False) for p in parts).flatten()
            for name in SHAPES
        ]
    )


def run(updates, before, **options):
    aggregation = make_rule(AggregationConfig(**options)).begin(before, 1)
    for update in updates:
        aggregation.add(update)
    return aggregation.finish()


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


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "multi-krum", "direction"])
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
    options = {"robust": robust, "byzantine": 2, "trim_fraction": 0.2}
    guarded = run(bad, before, rule=rule, **options)
    assert (plain - target).norm() > 0.5 * target.norm()
    assert (delta(guarded) - target).norm() < 0.2 * target.norm()
    assert guarded.error > 0.1  # far from the mean of all, which is what it is for
    names_them = robust in ("multi-krum", "direction")
    assert guarded.excluded == (("c2", "c7") if names_them else ())


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "multi-krum", "direction"])
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


def test_norms_of_changes_equal_the_dense_ones():
    generator = torch.Generator().manual_seed(8)
    before, after = adapter(generator), adapter(generator, rank=5, scaling=0.5)
    norms = change_norms(after, before)
    for name in SHAPES:
        dense = weight_delta(after.layers[name], 0.5, False) - weight_delta(
            before.layers[name], 2.0, False
        )
        assert norms[name] == pytest.approx(float(dense.norm()), rel=1e-5)


def test_refusal_names_the_layer_and_clipping_meets_the_bound():
    generator = torch.Generator().manual_seed(9)
    before, far = adapter(generator), ClientUpdate("eve", adapter(generator), 1.0)
    refuse_beyond(far, before, 0.0)
    refuse_beyond(far, before, 1e9)
    with pytest.raises(PayloadError, match=r"q: .*norm bound 1"):
        refuse_beyond(far, before, 1.0)
    assert clip_to(far, before, 0.0) is far
    assert torch.equal(clip_to(far, before, 1e9).adapter.layers["q"].A, far.adapter.layers["q"].A)
    for bound in (1e-3, 1.0, 20.0):
        clipped = clip_to(far, before, bound)
        assert list(change_norms(clipped.adapter, before).values()) == pytest.approx(
            [bound] * 2, rel=1e-3
        )
    other = ClientUpdate("eve", adapter(generator, rank=2), 1.0)
    with pytest.raises(ValueError, match="cannot be clipped"):
        clip_to(other, before, 1.0)


def test_clipping_keeps_the_direction_and_the_common_factor():
    generator = torch.Generator().manual_seed(10)
    before = adapter(generator)
    (far,) = replies(before, frozenset({LORA_B}), generator, 1)
    clipped = clip_to(far, before, 0.5).adapter.layers["q"]
    start, end = before.layers["q"], far.adapter.layers["q"]
    assert torch.equal(clipped.A, start.A)
    share = 0.5 / change_norms(far.adapter, before)["q"]
    torch.testing.assert_close(clipped.B, start.B + share * (end.B - start.B))


def test_a_nan_is_beyond_every_bound():
    generator = torch.Generator().manual_seed(11)
    before = adapter(generator)
    layers = {n: LoraFactors(f.A, f.B * torch.nan) for n, f in before.layers.items()}
    with pytest.raises(PayloadError):
        refuse_beyond(ClientUpdate("eve", Adapter(layers, 2.0), 1.0), before, 1.0)


def skewed(before, trained, generator, count=10, size=0.4):
    """Honest clients of two kinds, whose changes are opposed, each with noise of its own."""
    common, updates = adapter(generator), []
    for k in range(count):
        noise, side = adapter(generator, size=size / 2), size * (-1) ** k
        layers = {}
        for name, start in before.layers.items():
            lean, own = common.layers[name], noise.layers[name]
            layers[name] = LoraFactors(
                start.A + side * lean.A + own.A if LORA_A in trained else start.A,
                start.B + side * lean.B + own.B if LORA_B in trained else start.B,
            )
        updates.append(ClientUpdate(f"c{k}", Adapter(layers, before.scaling), 1.0 + k))
    return updates


def turned(update, trained):
    """What :mod:`simulations.faults` does to an update: the product changes its sign."""
    layers = {
        n: LoraFactors(f.A, -f.B) if LORA_B in trained else LoraFactors(-f.A, f.B)
        for n, f in update.adapter.layers.items()
    }
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


def dense(given, name):
    factors = given.layers[name]
    return given.scaling * factors.B.double() @ factors.A.double()


def test_inner_products_equal_the_dense_ones():
    generator = torch.Generator().manual_seed(13)
    one, other = adapter(generator), adapter(generator, rank=5, scaling=0.5)
    expected = sum(float((dense(one, n) * dense(other, n)).sum()) for n in SHAPES)
    assert inner(one, other) == pytest.approx(expected, rel=1e-12)
    assert inner(one, one) == pytest.approx(float(delta_of(one).square().sum()), rel=1e-12)


def delta_of(given):
    return torch.cat([dense(given, name).flatten() for name in SHAPES])


@pytest.mark.parametrize("trained", [BOTH, frozenset({LORA_B}), frozenset({LORA_A})])
@pytest.mark.parametrize("seed", range(5))
def test_turned_updates_of_skewed_clients_are_left_out_and_all_others_stay(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    before = adapter(generator)
    start, honest = RoundStart(before, trained), skewed(before, trained, generator)
    assert direction(honest, start).excluded == ()
    bad = [turned(u, trained) if k in (2, 7) else u for k, u in enumerate(honest)]
    assert direction(bad, start).excluded == ("c2", "c7")
    # no reference among the clients themselves: honest ones oppose each other
    moves = [delta_of(u.adapter) - delta_of(before) for u in honest[:2]]
    assert torch.cosine_similarity(*moves, dim=0) < -0.3


@pytest.mark.parametrize("rule", sorted(AGGREGATION_RULES))
@pytest.mark.parametrize("server_round", [1, 2])
def test_two_turned_of_ten_leave_the_mean_of_the_eight_others(rule, server_round):
    generator = torch.Generator().manual_seed(14)
    before = adapter(generator)
    made = make_rule(AggregationConfig(rule=rule, robust="direction"))
    trained = made.trained(server_round)
    honest = replies(before, trained, generator, 10, size=0.0)
    near = [moved_to(u, before, 0.3) for u in honest]
    bad = [turned(u, trained) if k in (2, 7) else u for k, u in enumerate(near)]
    aggregation = made.begin(before, server_round)
    for update in bad:
        aggregation.add(update)
    result = aggregation.finish()
    assert result.excluded == ("c2", "c7")
    target = delta_of(near[0].adapter)
    assert (delta(result) - target).norm() < 1e-5 * target.norm()


def moved_to(update, before, share):
    """The update, ``share`` of the way from the start."""
    layers = {
        n: LoraFactors(s.A + share * (f.A - s.A), s.B + share * (f.B - s.B))
        for (n, f), s in zip(update.adapter.layers.items(), before.layers.values(), strict=True)
    }
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


@pytest.mark.parametrize("new", [False, True])
def test_who_leaps_more_than_four_medians_is_left_out(new):
    generator = torch.Generator().manual_seed(15)
    before = adapter(generator)
    start = zeroed(before) if new else before
    honest = skewed(start, BOTH, generator)
    lengths = [(delta_of(u.adapter) - delta_of(start)).norm() for u in honest]
    assert max(lengths) < LONGEST * torch.stack(lengths).median()
    assert direction(honest, RoundStart(start, BOTH)).excluded == ()
    bad = [spoiled(u, "scaled") if k in (2, 7) else u for k, u in enumerate(honest)]
    survivors = direction(bad, RoundStart(start, BOTH))
    assert survivors.excluded == ("c2", "c7")
    others = [u for k, u in enumerate(honest) if k not in (2, 7)]
    assert all(a is b for a, b in zip(survivors.updates, others, strict=True))


def zeroed(before):
    layers = {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in before.layers.items()}
    return Adapter(layers, before.scaling)


def test_a_start_that_tells_nothing_excludes_nobody():
    """A new adapter is no reference, nor is a start that half of the clients turn away from."""
    generator = torch.Generator().manual_seed(16)
    before = adapter(generator)
    honest = skewed(before, BOTH, generator)
    bad = [turned(u, BOTH) if k < 5 else u for k, u in enumerate(honest)]
    assert direction(bad, RoundStart(before, BOTH)).excluded == ()
    assert direction(bad[1:], RoundStart(before, BOTH)).excluded == ("c1", "c2", "c3", "c4")
    assert direction(bad[1:], RoundStart(zeroed(before), BOTH)).excluded == ()


def test_the_last_verdict_stands_where_the_start_tells_nothing_and_nowhere_else():
    generator = torch.Generator().manual_seed(18)
    before = adapter(generator)
    new = zeroed(before)
    updates = skewed(before, BOTH, generator)
    known = frozenset({"c2", "c7", "gone"})
    assert direction(updates, RoundStart(new, BOTH, known)).excluded == ("c2", "c7")
    assert direction(updates, RoundStart(before, BOTH, known)).excluded == ()
    crowd = frozenset(f"c{k}" for k in range(5))
    assert direction(updates, RoundStart(new, BOTH, crowd)).excluded == ()


def test_direction_takes_mixed_ranks():
    generator = torch.Generator().manual_seed(17)
    before = adapter(generator, rank=6)
    aggregation = make_rule(AggregationConfig(rule="flexlora", robust="direction")).begin(before, 1)
    for k, rank in enumerate((2, 4, 6, 4, 2)):
        layers = {
            n: LoraFactors(f.A[:rank], (-1 if k == 1 else 1) * f.B[:, :rank])
            for n, f in before.layers.items()
        }
        aggregation.add(ClientUpdate(f"c{k}", Adapter(layers, before.scaling), 1.0))
    assert aggregation.finish().excluded == ("c1",)
