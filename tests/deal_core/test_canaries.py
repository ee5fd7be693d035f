"""Canaries: what they add to a step, and what their scores tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deal_core.attach import learning_factors, set_trainable
from deal_core.data import Example, TaskData
from deal_core.privacy.canaries import GradientCanaries, fair_coins
from deal_core.privacy.noise import SeededNoise
from deal_core.privacy.text_canaries import TextCanaries
from deal_core.randomness import seeded


class Nothing:
    """An objective that is never asked."""

    def example_losses(self, batch):
        raise AssertionError("the batch is empty")

    def penalty(self):
        return None


@pytest.fixture
def factors(minilm):
    set_trainable(minilm.module, frozenset({"lora_B"}))
    yield learning_factors(minilm.module)
    for weight in minilm.module.parameters():
        weight.grad = None


def test_directions_have_norm_one_and_are_nearly_orthogonal(factors):
    canaries = GradientCanaries(8, 0)
    flat = torch.stack(
        [
            torch.cat([part.flatten() for part in canaries.direction(k, factors).values()])
            for k in range(8)
        ]
    )
    products = flat @ flat.T
    assert torch.allclose(products.diag(), torch.ones(8), atol=1e-5)
    assert (products - torch.eye(8)).abs().max() < 0.05
    again = canaries.direction(3, dict(reversed(factors.items())))
    assert all(
        torch.equal(part, again[name]) for name, part in canaries.direction(3, factors).items()
    )


def test_a_canary_in_the_clipped_sum_has_the_largest_norm_allowed(minilm, factors):
    canaries = GradientCanaries(20, 1)
    summed = canaries.clipped_sum(1.0, SeededNoise(seeded(0)))
    summed(minilm.module, Nothing(), [], 0.5)
    expected: dict[str, torch.Tensor] = {}
    for k in np.flatnonzero(canaries.included):
        for name, part in canaries.direction(int(k), factors).items():
            expected[name] = expected.get(name, 0) + 0.5 * part
    for name, factor in factors.items():
        assert torch.allclose(factor.grad, expected[name], atol=1e-6)


def test_sampled_as_often_as_a_record_and_never_against_the_coin():
    canaries = GradientCanaries(400, 2)
    noise = SeededNoise(seeded(1))
    times = np.zeros(400)
    for _ in range(200):
        times[canaries.sampled(0.25, noise)] += 1
    assert not times[~canaries.included].any()
    assert times[canaries.included].mean() / 200 == pytest.approx(0.25, abs=0.01)


def test_scores_tell_who_was_there_and_nothing_else_does(factors):
    canaries = GradientCanaries(60, 3)
    noise = SeededNoise(seeded(2))
    update = {name: 1e-3 * noise.normal(f.shape).float() for name, f in factors.items()}
    for k in np.flatnonzero(canaries.included):
        for name, part in canaries.direction(int(k), factors).items():
            update[name] -= part
    scores = canaries.scores(update)
    assert scores[canaries.included].min() > scores[~canaries.included].max() + 0.5


def test_coins_are_fair_and_depend_on_the_seed_alone():
    assert fair_coins(10_000, 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(fair_coins(50, 7, "a"), fair_coins(50, 7, "a"))
    assert not np.array_equal(fair_coins(50, 7, "a"), fair_coins(50, 7, "b"))


def test_text_canaries_are_there_or_not_as_the_coin_says():
    train = tuple(Example(f"text {i}", "ab"[i % 2]) for i in range(40))
    shares = [TaskData("t", ("a", "b"), train, ()), TaskData("t", ("a", "b"), train, ())]
    canaries = TextCanaries(client=1, count=100, seed=0)
    planted = canaries.planted(shares[1])
    assert len(planted.canaries) == 20  # half of the site's
    assert {e.text for e in planted.canaries} | {e.text for e in planted.others} == {
        e.text for e in train
    }
    changed = canaries.prepare(shares)
    assert changed[0] == shares[0]
    texts = {e.text for e in changed[1].train}
    for example, included in zip(planted.canaries, planted.included, strict=True):
        assert (example.text in texts) == included
    own = {e.text: e.label for e in train}
    moved = sum(e.label != own[e.text] for e in planted.canaries)
    assert 4 <= moved <= 16  # random, not the other label
