"""The figures of membership inference, the attack on made-up sums, and its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from deal_core.privacy.audit.expected_membership import expected_auc
from deal_core.privacy.audit.membership import (
    area,
    as_added,
    known_of,
    sum_scores,
    true_positive_rate,
)
from deal_core.privacy.distributed_noise import COUNT_WEIGHT, clipped_class_sums

SIZE, SPREAD = 40, 0.5


def rows(rng: np.random.Generator, number: int) -> np.ndarray:
    return rng.normal(0.3, np.sqrt(SPREAD / SIZE), (number, SIZE))


@pytest.mark.parametrize(("members", "deviation"), [(5, 0.0), (20, 0.0), (20, 0.6), (80, 0.3)])
def test_a_gaussian_sum_is_told_as_well_as_theory_says(members: int, deviation: float) -> None:
    rng = np.random.default_rng((members, int(10 * deviation)))
    others, areas = np.eye(SIZE) * SPREAD / SIZE, []
    known = known_of(rows(rng, 4000), others)
    for _ in range(100):
        inside, outside = rows(rng, members), rows(rng, 200)
        total = inside.sum(axis=0) + deviation * rng.standard_normal(SIZE)
        scores = [sum_scores(x, total, members, deviation, known) for x in (inside, outside)]
        areas.append(area(*scores))
    one = SPREAD / SIZE
    squared = SIZE * one / (members * one + deviation**2)
    assert np.mean(areas) == pytest.approx(norm.cdf(np.sqrt(squared / 2)), abs=0.03)


def test_unnoised_small_sums_are_told() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rows(rng, 3), rows(rng, 300)
    known = known_of(rows(rng, 500), np.eye(SIZE) * SPREAD / SIZE)
    total = inside.sum(axis=0)
    assert area(*(sum_scores(x, total, 3, 0.0, known) for x in (inside, outside))) > 0.99


def test_what_a_record_adds_is_what_the_mechanism_adds() -> None:
    rng = np.random.default_rng(1)
    vectors = np.vstack([0.1 * rows(rng, 3), 5 * rows(rng, 3)])
    step = 2.0**-20
    total = clipped_class_sums(
        torch.from_numpy(vectors), torch.zeros(6, dtype=torch.long), 1, range(6), None, 1.0, step
    )
    expected = as_added(vectors, 1.0, COUNT_WEIGHT).sum(axis=0)
    np.testing.assert_allclose(step * total[0, :-1].numpy(), expected, atol=6 * step)


def test_more_noise_records_and_ignorance_tell_less() -> None:
    assert expected_auc(20, 256, 0.0) > expected_auc(80, 256, 0.0) > expected_auc(160, 256, 0.0)
    assert expected_auc(20, 256, 0.0) > expected_auc(20, 256, 0.6) > expected_auc(20, 256, 1.0)
    assert expected_auc(80, 256, 0.0) > expected_auc(80, 64, 0.0)
    assert expected_auc(80, 256, 0.0) > expected_auc(80, 256, 0.0, known=80)
    assert expected_auc(20, 256, 1e4) == pytest.approx(0.5, abs=1e-3)
    assert expected_auc(1, 256, 0.0) > 0.999
    for wrong in ((0, 256), (20, 0)):
        with pytest.raises(ValueError, match="directions"):
            expected_auc(*wrong, 0.6)


def test_known_areas() -> None:
    assert area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert area(np.ones(5), np.ones(7)) == 0.5
    assert area(np.array([1.0, 3.0]), np.array([2.0])) == 0.5


def test_at_most_one_in_a_thousand_others_passes() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 50_000), rng.normal(0, 1, 50_000)
    expected = norm.sf(norm.isf(1e-3) - 1)
    assert true_positive_rate(members, others) == pytest.approx(expected, abs=0.005)
    assert true_positive_rate(others, others) <= 1e-3
    assert true_positive_rate(np.ones(1000), np.ones(1000)) == 0.0
    assert true_positive_rate(members, others[:999]) is None
