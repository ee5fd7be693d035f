"""A temperature makes probabilities mean what they say."""

from __future__ import annotations

import pytest
import torch

from deal_core.inference.predictor import best_temperature, confidences_and_hits, gap


def test_a_temperature_undoes_scores_that_are_too_large_by_a_factor():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    targets = logits.softmax(1).multinomial(1, generator=generator)[:, 0].tolist()
    loud = (7 * logits).log_softmax(1).tolist()
    found = best_temperature(loud, targets)
    assert found == pytest.approx(7, rel=0.1)
    assert gap(*confidences_and_hits(loud, targets)) > 0.15
    assert gap(*confidences_and_hits(loud, targets, found)) < 0.03


def test_the_error_is_the_mean_distance_of_confidence_from_the_share_of_right_answers():
    confidences = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5], dtype=torch.float64)
    hits = torch.tensor([True, True, False, False, True])
    assert gap(confidences, hits) == pytest.approx((4 * 0.4 + 0.5) / 5)
