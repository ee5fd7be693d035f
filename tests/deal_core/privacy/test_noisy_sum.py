"""A site's part of a private sum: bounded whatever a record is, noised, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.deal.objective import Plain
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import set_trainable, write
from deal_core.lora.kinds import begin_pooled
from deal_core.models import load_model
from deal_core.privacy.distributed_noise import GRID_BITS, NoisySum, grid_step
from deal_core.privacy.dpsgd import Groups, UnsafeModel, clipping_bound
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SeededNoise

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


def sum_of(model, texts: list[str], bound: float = 0.05, noise: float = NO_NOISE, **changed):
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


def norm_of(change: dict[str, np.ndarray], bound: float) -> float:
    squares = sum(float((part.astype(float) ** 2).sum()) for part in change.values())
    return math.sqrt(squares) * grid_step(bound)


@pytest.mark.parametrize("left_out", [0, 23])
@pytest.mark.parametrize("bound", [0.05, 1.0])
def test_a_record_changes_the_rounded_sum_by_the_bound_at_most(model, left_out, bound):
    """Most gradients here are longer than the smaller bound: it is reached, and not passed."""
    rest = TEXTS[:left_out] + TEXTS[left_out + 1 :]
    whole, without = sum_of(model, TEXTS, bound), sum_of(model, rest, bound)
    change = norm_of({key: whole[key] - without[key] for key in whole}, bound)
    assert change <= bound
    if bound < 1:
        assert change > 0.9 * bound


def among(groups: Groups, size: int) -> Groups:
    """With a group more, whose records come after all others."""
    return Groups([*groups.numbers, *[len(groups)] * size])


THERE = Groups([n % 5 for n in range(len(TEXTS))])
"""Five groups, their records dealt in turn."""


@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize("bound", [0.05, 1.0])
def test_a_group_changes_the_rounded_sum_by_the_bound_at_most(model, size, bound):
    """However many records it has, its mean is clipped and then rounded: the bound is reached, and
    not passed. So it is with a loss that pulls far harder."""
    texts, more = MANY[: len(TEXTS) + size], among(THERE, size)
    for pull in (1.0, 1e6):
        whole = sum_of(model, texts, bound, groups=more, pull=pull)
        without = sum_of(model, TEXTS, bound, groups=THERE, pull=pull)
        change = norm_of({key: whole[key] - without[key] for key in whole}, bound)
        assert 0 < change <= bound
        if bound < 1 or pull > 1:
            assert change > 0.98 * bound


def test_a_group_of_equal_records_adds_what_one_of_them_does(model):
    one = sum_of(model, TEXTS[:1], groups=Groups([0]))
    fifty = sum_of(model, TEXTS[:1] * 50, groups=Groups([0] * 50))
    key = next(iter(one))
    assert np.abs(one[key]).max() > 100
    assert np.abs(one[key] - fifty[key]).max() <= 1  # steps of the grid


def test_the_sum_is_that_of_clipped_gradients(model):
    alone = [sum_of(model, [text]) for text in TEXTS[:6:3]]
    both = sum_of(model, TEXTS[:6:3])  # all of the first label
    key = next(iter(both))
    assert np.array_equal(both[key], sum(each[key] for each in alone))  # to the bit


def test_noise_is_a_share_and_has_its_size(model):
    totals = [sum_of(model, TEXTS[:3], noise=2.0, seed=seed) for seed in range(4)]
    quiet = sum_of(model, TEXTS[:3])
    key = next(iter(quiet))
    noise = np.concatenate([(total[key] - quiet[key]).ravel() for total in totals])
    assert noise.std() == pytest.approx(2.0 * 2**GRID_BITS / math.sqrt(3), rel=0.05)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(len(noise))


def test_no_gradient_is_left_behind(model):
    sum_of(model, TEXTS)
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_the_bound_counts_rounding():
    own = clipping_bound(1.0, 1152, GRID_BITS)
    assert own == pytest.approx(1 - math.sqrt(1152) / 2**17, abs=2e-9)
    assert own + math.sqrt(1152) * grid_step(1.0) / 2 <= 1.0
    with pytest.raises(UnsafeModel, match="too many"):
        clipping_bound(1.0, 2**34, GRID_BITS)
