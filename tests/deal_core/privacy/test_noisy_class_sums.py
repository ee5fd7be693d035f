"""A site's noisy class sums: what one record, or group, changes is bounded whatever it is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import (
    COUNT_WEIGHT,
    GRID_BITS,
    NoisySum,
    clipped_class_sums,
    grid_step,
)
from deal_core.privacy.dpsgd import Groups, UnsafeModel
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SeededNoise
from deal_core.randomness import seeded

SIZE, LABELS, RECORDS = 16, 3, 60
FINE = 2.0**-40
FULL = 1 / math.sqrt(1 + COUNT_WEIGHT**2)
"""What clipping at 1 leaves of a unit vector with its count."""


def records(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded("class sums", seed)
    x = normalize(torch.randn(RECORDS, SIZE, generator=generator), dim=1) * scale
    return x, torch.randint(LABELS, (RECORDS,), generator=generator)


def noisy(numbers: list[int], noise: float = 0.0, seed: int = 0, **changed: object) -> NoisySum:
    data = [Encoded(tokens=(1, 2), target=0) for _ in numbers]
    ids = [RecordId("task", n) for n in numbers]
    source = SeededNoise(torch.Generator().manual_seed(seed))
    hidden = {"sample_rate": 1.0, "noise_multiplier": noise, "max_grad_norm": 1.0}
    return NoisySum(
        **{"data": data, "record_ids": ids, **changed}, shares=3, **hidden, noise=source
    )


def total_of(x: torch.Tensor, y: torch.Tensor, **asked: object) -> np.ndarray:
    made = noisy(list(range(len(x))), **asked)
    return made.class_sums(x, y, LABELS) * grid_step(1.0)


def test_without_noise_they_are_sums_and_counts():
    x, y = records()
    total = total_of(x, y)
    for label in range(LABELS):
        own = x[y == label].double()
        np.testing.assert_allclose(total[label, :-1], FULL * own.sum(0).numpy(), atol=2e-3)
        assert total[label, -1] / (FULL * COUNT_WEIGHT) == pytest.approx(len(own), abs=0.05)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30, math.inf, math.nan])
def test_a_record_changes_them_by_the_bound_at_most(scale):
    """However long its embedding is; one that is no number adds nothing."""
    x, y = records()
    x[0] = x[0] * scale
    change = total_of(x, y) - total_of(x[1:], y[1:])
    length = float(np.sqrt((change**2).sum()))
    assert length <= 1.0
    assert length > 0.99 or not math.isfinite(scale)


@pytest.mark.parametrize("members", [1, 50])
def test_a_group_changes_them_by_the_bound_at_most(members):
    """Its records may have one label or all: it is their mean that is clipped."""
    x, y = records()
    numbers = [0] * members + list(range(1, RECORDS - members + 1))
    rest = Groups([n - 1 for n in numbers[members:]])
    for labels in (y, torch.zeros_like(y)):
        whole = clipped_class_sums(x, labels, LABELS, range(RECORDS), Groups(numbers), 1.0, FINE)
        places = range(RECORDS - members)
        without = clipped_class_sums(x[members:], labels[members:], LABELS, places, rest, 1.0, FINE)
        assert float((whole - without).double().norm()) * FINE <= 1 + 1e-9


def test_a_group_of_one_is_a_record():
    x, y = records()
    one, two = Groups(range(RECORDS - 2)), Groups([*range(RECORDS - 2), 0, 0])
    batch = range(1, RECORDS - 2)  # without the one that has three records
    sums = [clipped_class_sums(x, y, LABELS, batch, each, 0.5, FINE) for each in (one, two)]
    assert torch.equal(*sums)


def test_noise_is_a_share_and_has_its_size():
    x, y = records()
    quiet = total_of(x, y)
    noise = np.concatenate([(total_of(x, y, noise=2.0, seed=s) - quiet).ravel() for s in range(40)])
    expected = 2.0 / math.sqrt(3)
    assert noise.std() == pytest.approx(expected, rel=0.05)
    assert abs(noise.mean()) < 4 * expected / math.sqrt(len(noise))


def test_on_no_record_they_are_noise_alone():
    made = noisy([], noise=2.0)
    nothing = torch.zeros(0, SIZE), torch.zeros(0, dtype=torch.long)
    total = np.stack(
        [replace(made, noise=_seeded(s)).class_sums(*nothing, LABELS) for s in range(40)]
    )
    assert total.std() == pytest.approx(2.0 * 2**GRID_BITS / math.sqrt(3), rel=0.05)


def _seeded(seed: int) -> SeededNoise:
    return SeededNoise(torch.Generator().manual_seed(seed))


def test_records_that_are_no_sample_are_refused():
    x, y = records()
    doubled = [RecordId("task", 0)] * RECORDS
    with pytest.raises(UnsafeModel):
        noisy(list(range(RECORDS)), record_ids=doubled).class_sums(x, y, LABELS)
