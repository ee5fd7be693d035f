"""A site's part of a private sum, of gradients or of class sums: what one record, or group, changes
is bounded whatever it is; noised, and nothing else."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.deal.objective import Plain
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import set_trainable, write
from deal_core.lora.kinds import begin_pooled
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import (
    COUNT_WEIGHT,
    GRID_BITS,
    NoisySum,
    clipped_class_sums,
    grid_step,
)
from deal_core.privacy.dpsgd import Groups, UnsafeModel, clipping_bound
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SeededNoise
from deal_core.randomness import seeded

LABELS = ("Pathology", "Surgery", "Pharmacology")
MANY = [f"{'wound and fracture' if n % 2 else 'dose of a drug'} number {n}" for n in range(74)]
TEXTS = MANY[:24]
NO_NOISE = 1e-9


@pytest.fixture(scope="module")
def model():
    adapter = AdapterConfig(kind="pooled", rank=2, lora_alpha=2)
    loaded = load_model(ModelConfig(), adapter, 32)
    labels = loaded.label_vectors(LABELS)
    start = zero_adapter({"pooled": (384, 384)}, 2)
    write(loaded.module, begin_pooled(start, labels, labels[:0]))
    set_trainable(loaded.module, frozenset({"lora_A"}))
    return loaded


def sum_of(model, texts, bound=0.05, noise=NO_NOISE, **changed):
    number = {text: n for n, text in enumerate(MANY)}
    data = model.encode([Example(text, LABELS[number[text] % 3]) for text in texts], LABELS)
    ids = [RecordId("task", n) for n in range(len(data))]
    generator = torch.Generator().manual_seed(changed.pop("seed", 0))
    pull = changed.pop("pull", 1.0)
    made = NoisySum(
        data,
        ids,
        3,
        sample_rate=1.0,
        noise_multiplier=noise,
        max_grad_norm=bound,
        noise=SeededNoise(generator),
        **changed,
    )
    return made.total(model.module, Pulled(model, LABELS, made.data, pull=pull))


@dataclass(frozen=True)
class Pulled(Plain):
    """Times a factor."""

    pull: float = 1.0

    def example_losses(self, batch):
        return super().example_losses(batch) * self.pull


def norm_of(change, bound):
    squares = sum(float((part.astype(float) ** 2).sum()) for part in change.values())
    return math.sqrt(squares) * grid_step(bound)


@pytest.mark.parametrize("left_out", [0, 23])
def test_a_record_changes_the_rounded_sum_by_the_bound_at_most(model, left_out):
    """Most gradients here are longer than the bound: it is reached, and not passed."""
    rest = TEXTS[:left_out] + TEXTS[left_out + 1 :]
    whole, without = sum_of(model, TEXTS), sum_of(model, rest)
    assert 0.9 * 0.05 < norm_of({key: whole[key] - without[key] for key in whole}, 0.05) <= 0.05


@pytest.mark.parametrize(("size", "bound"), [(1, 1.0), (50, 0.05), (50, 1.0)])
def test_a_group_changes_the_rounded_sum_by_the_bound_at_most(model, size, bound):
    """However many records it has, its mean is clipped and then rounded: the bound is reached, and
    not passed. So it is with a loss that pulls far harder."""
    there = [n % 5 for n in range(len(TEXTS))]  # five groups, their records dealt in turn
    texts, more = MANY[: len(TEXTS) + size], Groups([*there, *[5] * size])
    for pull in (1.0, 1e6):
        whole = sum_of(model, texts, bound, groups=more, pull=pull)
        without = sum_of(model, TEXTS, bound, groups=Groups(there), pull=pull)
        change = norm_of({key: whole[key] - without[key] for key in whole}, bound)
        assert 0 < change <= bound
        if bound < 1 or pull > 1:
            assert change > 0.98 * bound


def test_the_sum_is_that_of_clipped_gradients(model):
    alone = [sum_of(model, [text]) for text in TEXTS[:6:3]]
    both = sum_of(model, TEXTS[:6:3])  # all of the first label
    key = next(iter(both))
    assert np.array_equal(both[key], sum(each[key] for each in alone))  # to the bit
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_noise_is_a_share_and_has_its_size(model):
    totals = [sum_of(model, TEXTS[:3], noise=2.0, seed=seed) for seed in range(4)]
    quiet = sum_of(model, TEXTS[:3])
    key = next(iter(quiet))
    noise = np.concatenate([(total[key] - quiet[key]).ravel() for total in totals])
    assert noise.std() == pytest.approx(2.0 * 2**GRID_BITS / math.sqrt(3), rel=0.05)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(len(noise))


def test_the_bound_counts_rounding():
    own = clipping_bound(1.0, 1152, GRID_BITS)
    assert own == pytest.approx(1 - math.sqrt(1152) / 2**17, abs=2e-9)
    assert own + math.sqrt(1152) * grid_step(1.0) / 2 <= 1.0
    with pytest.raises(UnsafeModel, match="too many"):
        clipping_bound(1.0, 2**34, GRID_BITS)


SIZE, CLASSES, RECORDS = 16, 3, 60
FINE = 2.0**-40
FULL = 1 / math.sqrt(1 + COUNT_WEIGHT**2)
"""What clipping at 1 leaves of a unit vector with its count."""


def records(seed=0, scale=1.0):
    generator = seeded("class sums", seed)
    x = normalize(torch.randn(RECORDS, SIZE, generator=generator), dim=1) * scale
    return x, torch.randint(CLASSES, (RECORDS,), generator=generator)


def noisy(numbers, noise=0.0, seed=0, **changed):
    data = [Encoded(tokens=(1, 2), target=0) for _ in numbers]
    ids = [RecordId("task", n) for n in numbers]
    source = _seeded(seed)
    hidden = {"sample_rate": 1.0, "noise_multiplier": noise, "max_grad_norm": 1.0}
    return NoisySum(
        **{"data": data, "record_ids": ids, **changed}, shares=3, **hidden, noise=source
    )


def total_of(x, y, **asked):
    made = noisy(list(range(len(x))), **asked)
    return made.class_sums(x, y, CLASSES) * grid_step(1.0)


def test_without_noise_class_sums_are_sums_and_counts():
    x, y = records()
    total = total_of(x, y)
    for label in range(CLASSES):
        own = x[y == label].double()
        np.testing.assert_allclose(total[label, :-1], FULL * own.sum(0).numpy(), atol=2e-3)
        assert total[label, -1] / (FULL * COUNT_WEIGHT) == pytest.approx(len(own), abs=0.05)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30, math.inf, math.nan])
def test_a_record_changes_class_sums_by_the_bound_at_most(scale):
    """However long its embedding is; one that is no number adds nothing."""
    x, y = records()
    x[0] = x[0] * scale
    change = total_of(x, y) - total_of(x[1:], y[1:])
    length = float(np.sqrt((change**2).sum()))
    assert length <= 1.0
    assert length > 0.99 or not math.isfinite(scale)


@pytest.mark.parametrize("members", [1, 50])
def test_a_group_changes_class_sums_by_the_bound_at_most(members):
    """Its records may have one label or all: it is their mean that is clipped."""
    x, y = records()
    numbers = [0] * members + list(range(1, RECORDS - members + 1))
    rest = Groups([n - 1 for n in numbers[members:]])
    for labels in (y, torch.zeros_like(y)):
        whole = clipped_class_sums(x, labels, CLASSES, range(RECORDS), Groups(numbers), 1.0, FINE)
        places = range(RECORDS - members)
        without = clipped_class_sums(
            x[members:], labels[members:], CLASSES, places, rest, 1.0, FINE
        )
        assert float((whole - without).double().norm()) * FINE <= 1 + 1e-9


def test_a_group_of_one_is_a_record():
    x, y = records()
    one, two = Groups(range(RECORDS - 2)), Groups([*range(RECORDS - 2), 0, 0])
    batch = range(1, RECORDS - 2)  # without the one that has three records
    sums = [clipped_class_sums(x, y, CLASSES, batch, each, 0.5, FINE) for each in (one, two)]
    assert torch.equal(*sums)


def test_noise_in_class_sums_is_a_share_and_has_its_size():
    x, y = records()
    quiet = total_of(x, y)
    noise = np.concatenate([(total_of(x, y, noise=2.0, seed=s) - quiet).ravel() for s in range(40)])
    expected = 2.0 / math.sqrt(3)
    assert noise.std() == pytest.approx(expected, rel=0.05)
    assert abs(noise.mean()) < 4 * expected / math.sqrt(len(noise))


def test_class_sums_of_no_record_are_noise_alone():
    made = noisy([], noise=2.0)
    nothing = torch.zeros(0, SIZE), torch.zeros(0, dtype=torch.long)
    total = np.stack(
        [replace(made, noise=_seeded(s)).class_sums(*nothing, CLASSES) for s in range(40)]
    )
    assert total.std() == pytest.approx(2.0 * 2**GRID_BITS / math.sqrt(3), rel=0.05)


def _seeded(seed):
    return SeededNoise(torch.Generator().manual_seed(seed))


def test_records_that_are_no_sample_are_refused():
    x, y = records()
    doubled = [RecordId("task", 0)] * RECORDS
    with pytest.raises(UnsafeModel):
        noisy(list(range(RECORDS)), record_ids=doubled).class_sums(x, y, CLASSES)
