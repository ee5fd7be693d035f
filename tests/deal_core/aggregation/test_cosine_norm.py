"""Who turns the model around, or leaps, is left out; all others stay."""

from dataclasses import replace

import pytest
import torch

from deal_core.aggregation.rule import BOTH, LORA_A, LORA_B, ClientUpdate
from deal_core.aggregation.rules import AGGREGATION_RULES, make_rule
from deal_core.aggregation.screen import LONGEST, change_norm, inner, left_out
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from tests.deal_core.aggregation.updates import (
    SHAPES,
    adapter,
    delta,
    delta_of,
    dense,
    moved_by,
    moved_to,
    replies,
    run,
    skewed,
    spoiled,
    turned,
    zeroed,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_inner_products_equal_the_dense_ones():
    generator = torch.Generator().manual_seed(13)
    one, other = adapter(generator), adapter(generator, rank=5, scaling=0.5)
    expected = sum(float((dense(one, n) * dense(other, n)).sum()) for n in SHAPES)
    assert inner(one, other) == pytest.approx(expected, rel=1e-12)
    assert inner(one, one) == pytest.approx(float(delta_of(one).square().sum()), rel=1e-12)


def test_norms_of_changes_equal_the_dense_ones():
    generator = torch.Generator().manual_seed(8)
    before, after = adapter(generator), adapter(generator, rank=5, scaling=0.5)
    expected = (delta_of(after) - delta_of(before)).norm()
    assert change_norm(after, before) == pytest.approx(float(expected))


@pytest.mark.parametrize("trained", [BOTH, frozenset({LORA_B}), frozenset({LORA_A})])
@pytest.mark.parametrize("seed", range(5))
def test_turned_updates_of_skewed_clients_are_left_out_and_all_others_stay(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    before = adapter(generator)
    honest = skewed(before, trained, generator)
    assert left_out(honest, before) == set()
    bad = [turned(u, trained) if k in (2, 7) else u for k, u in enumerate(honest)]
    assert left_out(bad, before) == {"c2", "c7"}
    # no reference among the clients themselves: honest ones oppose each other
    moves = [delta_of(u.adapter) - delta_of(before) for u in honest[:2]]
    assert torch.cosine_similarity(*moves, dim=0) < -0.3


def test_a_small_model_is_judged_as_a_large_one():
    generator = torch.Generator().manual_seed(3)
    start = adapter(generator)
    before = replace(start, scaling=start.scaling * 1e-4)
    updates = skewed(before, BOTH, generator)
    assert max(inner(update.adapter, before) for update in updates) < 1
    bad = [turned(u, BOTH) if k in (2, 7) else u for k, u in enumerate(updates)]
    assert left_out(bad, before) == {"c2", "c7"}


@pytest.mark.parametrize("rule", sorted(AGGREGATION_RULES))
def test_two_turned_of_ten_leave_the_mean_of_the_eight_others(rule):
    generator = torch.Generator().manual_seed(14)
    before = adapter(generator)
    made = make_rule(AggregationConfig(rule=rule, robust="cosine-norm"))
    trained = made.trained
    near = moved_by(before, trained, (0.3, adapter(generator)))
    honest = [ClientUpdate(f"c{k}", near, 1.0 + k) for k in range(10)]
    bad = [turned(u, trained) if k in (2, 7) else u for k, u in enumerate(honest)]
    aggregation = made.begin(before)
    for update in bad:
        aggregation.add(update)
    result = aggregation.finish()
    assert result.excluded == ("c2", "c7")
    target = delta_of(near)
    assert (delta(result) - target).norm() < 1e-5 * target.norm()


@pytest.mark.parametrize("new", [False, True])
def test_who_leaps_more_than_four_medians_is_left_out(new):
    generator = torch.Generator().manual_seed(15)
    before = adapter(generator)
    start = zeroed(before) if new else before
    honest = skewed(start, BOTH, generator)
    lengths = [(delta_of(u.adapter) - delta_of(start)).norm() for u in honest]
    assert max(lengths) < LONGEST * torch.stack(lengths).median()
    assert left_out(honest, start) == set()
    bad = [spoiled(u, "scaled") if k in (2, 7) else u for k, u in enumerate(honest)]
    assert left_out(bad, start) == {"c2", "c7"}
    others = [u for k, u in enumerate(honest) if k not in (2, 7)]
    guarded, expected = run(bad, start, robust="cosine-norm"), run(others, start)
    for name, factors in expected.current.layers.items():
        assert torch.equal(guarded.current.layers[name].A, factors.A)
        assert torch.equal(guarded.current.layers[name].B, factors.B)


@pytest.mark.parametrize(("share", "out"), [(3.9, set()), (4.1, {"c4"})])
def test_the_limit_of_a_leap_is_four_medians(share, out):
    full = adapter(torch.Generator().manual_seed(17))
    start = zeroed(full)  # lengths grow with the share
    shares = (1.0, 1.0, 1.0, 1.0, share)
    updates = [moved_to(ClientUpdate(f"c{k}", full, 1.0), start, s) for k, s in enumerate(shares)]
    assert left_out(updates, start) == out


def test_a_start_that_tells_nothing_excludes_nobody():
    """A new adapter is no reference, nor is a start that half of the clients turn away from."""
    generator = torch.Generator().manual_seed(16)
    before = adapter(generator)
    honest = skewed(before, BOTH, generator)
    bad = [turned(u, BOTH) if k < 5 else u for k, u in enumerate(honest)]
    assert left_out(bad, before) == set()
    assert left_out(bad[1:], before) == {"c1", "c2", "c3", "c4"}
    assert left_out(bad[1:], zeroed(before)) == set()


def test_the_last_verdict_stands_where_the_start_tells_nothing_and_nowhere_else():
    generator = torch.Generator().manual_seed(18)
    before = adapter(generator)
    new = zeroed(before)
    updates = skewed(before, BOTH, generator)
    known = frozenset({"c2", "c7", "gone"})
    assert left_out(updates, new, known) == {"c2", "c7"}
    assert left_out(updates, before, known) == set()
    crowd = frozenset(f"c{k}" for k in range(5))
    assert left_out(updates, new, crowd) == set()


def test_where_most_have_not_moved_who_has_is_not_left_out():
    """A task with one label has no gradient; the others learn."""
    generator = torch.Generator().manual_seed(19)
    before = adapter(generator)
    moved = {
        n: LoraFactors(f.A, f.B + 0.01 * torch.randn(f.B.shape, generator=generator))
        for n, f in before.layers.items()
    }
    still = [ClientUpdate(f"c{k}", before, 1.0) for k in range(3)]
    learnt = [ClientUpdate(f"c{k}", Adapter(moved, before.scaling), 1.0) for k in (3, 4)]
    assert left_out([*still, *learnt], before) == set()


def test_cosine_norm_takes_mixed_ranks():
    generator = torch.Generator().manual_seed(17)
    before = adapter(generator, rank=6)
    aggregation = make_rule(AggregationConfig(rule="flora", robust="cosine-norm")).begin(before)
    for k, rank in enumerate((2, 4, 6, 4, 2)):
        layers = {
            n: LoraFactors(f.A[:rank], (-1 if k == 1 else 1) * f.B[:, :rank])
            for n, f in before.layers.items()
        }
        aggregation.add(ClientUpdate(f"c{k}", Adapter(layers, before.scaling), 1.0))
    assert aggregation.finish().excluded == ("c1",)


@pytest.mark.parametrize("kind", ["flipped", "scaled"])
@pytest.mark.parametrize("rule", sorted(AGGREGATION_RULES))
def test_two_bad_of_ten_do_not_carry_the_round(rule, kind):
    generator = torch.Generator().manual_seed(3)
    before = adapter(generator)
    trained = make_rule(AggregationConfig(rule=rule)).trained
    clean = replies(before, trained, generator, 10)
    bad = [spoiled(u, kind) if k in (2, 7) else u for k, u in enumerate(clean)]
    target = delta(run(clean, before, rule=rule))
    plain = delta(run(bad, before, rule=rule))
    guarded = run(bad, before, rule=rule, robust="cosine-norm")
    assert (plain - target).norm() > 0.5 * target.norm()
    assert (delta(guarded) - target).norm() < 0.2 * target.norm()
    assert guarded.error > 0.1  # far from the mean of all, which is what it is for
    assert guarded.excluded == ("c2", "c7")
