from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.baselines.replay import Replay, kept_examples, paired
from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.config.method import MethodConfig
from deal_core.data import Example
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.methods import LocalTask, TaskDataset, TaskHistory, make_method
from deal_core.models import adapter_shapes
from deal_core.models.interface import Encoded
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import load_state

LABELS = ("Anatomy", "Surgery")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("Bones", "Anatomy"),
]
FIRST, SECOND = ("Dental", "Skin", "Eye"), ("Heart", "Lung")
OLD = [
    (FIRST, [Example("Caries of the lower molar", "Dental"), Example("Blurred vision", "Eye")]),
    (SECOND, [Example("A murmur in systole", "Heart"), Example("Wheezing", "Lung")]),
]


def past(shares) -> TaskHistory:
    return TaskHistory([lambda share=share: share for share in shares], None, len(shares))


def numbered(count: int, first: int = 0) -> TaskDataset:
    return TaskDataset(("a",), [Encoded((first + i,), 0) for i in range(count)])


@pytest.fixture(scope="module")
def start() -> State:
    shapes = adapter_shapes(ModelConfig(), AdapterConfig())
    empty = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    return make_method(MethodConfig(name="replay"), AdapterConfig()).begin_task(empty, seeded(0))


@pytest.fixture(scope="module")
def old_shares(minilm) -> list[TaskDataset]:
    return [TaskDataset(labels, minilm.encode(examples, labels)) for labels, examples in OLD]


def objective(minilm, state, shares, **settings):
    task = LocalTask(LABELS, (FIRST, SECOND), past(shares))
    data = minilm.encode(DATA, LABELS)
    built = Replay(AdapterConfig(), **settings)
    return built.objective(minilm, state, task, data, Cache()), data


def test_losses_are_those_of_single_examples_each_in_its_own_label_space(minilm, start, old_shares):
    load_state(minilm, start)
    built, data = objective(minilm, start, old_shares, share=1.0)
    labels = [FIRST, SECOND]
    with torch.no_grad():
        found = built.example_losses([2, 0, 1])
        for loss, i in zip(found, [2, 0, 1], strict=True):
            position, old = built.partners[i]
            one, other = minilm.scores([data[i]], LABELS), minilm.scores([old], labels[position])
            expected = cross_entropy(one, torch.tensor([data[i].target])) + cross_entropy(
                other, torch.tensor([old.target])
            )
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert {position for position, _ in built.partners} == {0, 1}


def test_a_share_of_every_earlier_task_is_kept_the_same_in_all_later_ones():
    shares = [numbered(40), numbered(5, 100), numbered(0)]
    kept = kept_examples(past(shares), 0.1)
    assert Counter(position for position, _ in kept) == {0: 4, 1: 1}
    assert len(set(kept)) == 5
    assert all(example in shares[position].data for position, example in kept)
    assert kept_examples(past([*shares, numbered(20, 200)]), 0.1)[:5] == kept
    assert len(kept_examples(past(shares), 1.0)) == 45
    assert kept_examples(past(shares), 0.0) == []
    assert len(kept_examples(past([numbered(100)]), 0.07)) == 7  # the float is 7.000000000000001


def test_every_old_example_comes_equally_often():
    old = kept_examples(past([numbered(7)]), 1.0)
    counts = Counter(paired(old, 24, seeded(1)))
    assert len(counts) == 7
    assert set(counts.values()) == {3, 4}
    assert len(paired(old, 3, seeded(1))) == 3


def test_partners_change_with_the_round(minilm, start, random_adapter, old_shares):
    many = [TaskDataset(FIRST, old_shares[0].data * 20)]
    later = State(random_adapter(start.current.shapes, 8, 2.0, 1), start.retained)
    first, _ = objective(minilm, start, old_shares, share=1.0)
    again, _ = objective(minilm, start, old_shares, share=1.0)
    second, _ = objective(minilm, later, old_shares, share=1.0)
    assert first.partners == again.partners
    assert first.partners != second.partners
    assert len(objective(minilm, start, many, share=1.0)[0].partners) == 3
    apart = State(start.current, start.retained, random_adapter(start.current.shapes, 2, 1.0, 3))
    third, _ = objective(minilm, apart, old_shares, share=1.0)  # what flora has learnt
    assert first.partners != third.partners
