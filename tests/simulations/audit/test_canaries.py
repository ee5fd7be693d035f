"""Canaries: what they add to a step, and what their scores tell."""

import numpy as np
import pytest
import torch

from deal_core.deal.objective import Plain
from deal_core.errors import UserError
from deal_core.lora.attach import learning_factors, set_trainable
from deal_core.models.interface import Encoded
from simulations.audit.canaries import (
    ENTRY,
    GradientCanaries,
    PlantedObjective,
    likelihood_ratio,
)
from tests.deal_core.training.clipped import clipped_gradients

RECORDS = [Encoded((101, 2540, 102), 0), Encoded((101, 3096, 2003, 2009, 102), 1)]
LABELS = ("heart", "skin")


@pytest.fixture(params=[{"lora_B"}, {"lora_A", "lora_B"}])
def factors(minilm, request):
    set_trainable(minilm.module, frozenset(request.param))
    yield learning_factors(minilm.module)
    for weight in minilm.module.parameters():
        weight.grad = None


def planted(minilm, canaries, length=50.0):
    return PlantedObjective(
        Plain(minilm, LABELS, RECORDS), minilm.module, len(RECORDS), canaries, length
    )


def direction(canaries, number, factors):
    """One of them, dense, of norm 1."""
    entries, names = canaries.entries(factors), sorted(factors)
    flat = torch.zeros(sum(factor.numel() for factor in factors.values()))
    first, second = entries.places[number].tolist()
    flat[first] = ENTRY * float(entries.signs[number])
    flat[second] = -flat[first]
    parts = torch.split(flat, [factors[name].numel() for name in names])
    return {n: part.view(factors[n].shape) for n, part in zip(names, parts, strict=True)}


def taken(factors):
    """All gradients; forgets them."""
    gradients = {name: factor.grad.clone() for name, factor in factors.items()}
    for factor in factors.values():
        factor.grad = None
    return gradients


def test_directions_have_norm_one_and_share_no_entry(factors):
    canaries = GradientCanaries(1000, 0)
    entries = canaries.entries(factors)
    assert len(np.unique(entries.places)) == 2000
    again = canaries.entries(dict(reversed(factors.items())))
    assert np.array_equal(again.places, entries.places)
    for number in (0, 17, 999):
        flat = torch.cat([p.flatten() for p in direction(canaries, number, factors).values()])
        assert float(flat.norm()) == pytest.approx(1.0)
        assert float(flat.sum()) == 0.0
    other = GradientCanaries(1000, 0, repeat=1)
    assert not np.array_equal(other.entries(factors).places, entries.places)
    assert not np.array_equal(other.included, canaries.included)
    assert canaries.included.mean() == pytest.approx(0.5, abs=0.06)


def test_noise_that_layers_of_a_shape_share_is_not_seen(factors):
    """Their two entries are at one place of two layers of one shape: equal parts cancel."""
    shared = {shape: torch.randn(shape) for shape in {f.shape for f in factors.values()}}
    alike = {name: shared[f.shape] for name, f in factors.items()}
    scores = GradientCanaries(1000, 0).scores(alike)
    assert np.abs(scores).max() == 0.0


def test_more_canaries_than_room_are_refused(factors):
    room = sum(factor.numel() for factor in factors.values()) // 2
    with pytest.raises(UserError, match=f"room for {room} gradient canaries"):
        GradientCanaries(room + 1, 0).entries(factors)


def test_a_canary_has_its_direction_for_gradient_and_is_clipped_like_a_record(minilm, factors):
    canaries = GradientCanaries(12, 1)
    objective = planted(minilm, canaries)
    batch = [3, 0, 5, 1, *range(6, 14)]  # in any order
    norms = clipped_gradients(minilm.module, objective, batch, 0.5)
    together = taken(factors)
    there = np.array([p >= 2 and canaries.included[p - 2] for p in batch])
    away = np.array([p >= 2 and not canaries.included[p - 2] for p in batch])
    assert np.allclose(norms.numpy()[there], 50.0, rtol=1e-5)
    assert not norms.numpy()[away].any()
    clipped_gradients(minilm.module, objective.inner, [0, 1], 0.5)
    expected = taken(factors)
    for number in (p - 2 for p in batch if p >= 2):
        for name, part in direction(canaries, number, factors).items():
            expected[name] += 0.5 * part * float(canaries.included[number])
    for name in factors:
        torch.testing.assert_close(together[name], expected[name], rtol=1e-4, atol=1e-5)


def test_scores_tell_who_was_there_and_nothing_else_does(factors):
    canaries = GradientCanaries(60, 3)
    change = {name: 1e-3 * torch.randn(f.shape) for name, f in factors.items()}
    for k in np.flatnonzero(canaries.included):
        for name, part in direction(canaries, int(k), factors).items():
            change[name] += part
    scores = canaries.scores(change)
    assert scores[canaries.included].min() > scores[~canaries.included].max() + 0.9


def test_the_likelihood_ratio_is_that_of_the_two_densities():
    x, q, sigma = np.array([-2.0, 0.0, 1.5, 4.0]), 0.3, 0.8

    def density(at):
        return np.exp(-((x - at) ** 2) / (2 * sigma**2))

    expected = np.log((1 - q) + q * density(1.0) / density(0.0))
    assert np.allclose(likelihood_ratio(x, q, sigma), expected)
    assert np.isfinite(likelihood_ratio(100 * x, q, sigma)).all()
    assert np.allclose(likelihood_ratio(x, 1.0, sigma), (x - 0.5) / sigma**2)
