"""A client's label shares, and a loss whose logits they adjust."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.config.experiment import (
    AdapterConfig,
    Experiment,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from deal_core.config.method import MethodConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import read
from deal_core.lora.state import State
from deal_core.methods import LocalTask, TaskDataset, make_method
from deal_core.models import Encoded, adapter_shapes
from deal_core.privacy.mechanisms.registry import make_mechanism
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.training.label_prior import log_shares
from deal_core.training.loop import load_state, train
from tests.deal_core.methods.distilling import DATA, LABELS, SEEN, expected_losses, first_task

TASK = LocalTask(LABELS, ())
TARGETS = torch.tensor([0, 1, 0])
SHARES = torch.tensor([3 / 5, 2 / 5])


@pytest.fixture(scope="module")
def empty() -> State:
    shapes = adapter_shapes(ModelConfig(), AdapterConfig())
    return State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))


def deal(strength: float, **tables):
    config = {"logit_adjustment": strength, **tables}
    return make_method(MethodConfig.model_validate(config), AdapterConfig())


def losses(minilm, empty, strength, task, data, **tables):
    built = deal(strength, **tables)
    state = built.begin_task(empty, seeded(0))
    load_state(minilm, state)
    objective = built.objective(minilm, state, task, data, Cache())
    with torch.no_grad():
        return objective.example_losses(range(len(data)))


def test_every_label_counts_once_more_than_it_occurs():
    data = [Encoded((1,), target) for target in (2, 0, 2, 2)]
    expected = [math.log(2 / 8), math.log(1 / 8), math.log(4 / 8), math.log(1 / 8)]
    assert log_shares(data, 4).tolist() == pytest.approx(expected)
    assert log_shares([], 3).tolist() == pytest.approx([math.log(1 / 3)] * 3)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_the_loss_is_cross_entropy_over_adjusted_scores(minilm, empty, strength):
    data = minilm.encode(DATA, LABELS)
    found = losses(minilm, empty, strength, TASK, data)
    with torch.no_grad():
        scores = minilm.scores(data, LABELS)
    expected = cross_entropy(scores + strength * SHARES.log(), TARGETS, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_a_teacher_thinks_is_adjusted_by_nothing(minilm, empty, random_adapter):
    built = deal(2.0, distillation={"future_weight": 0.5})
    data, shapes = minilm.encode(DATA, LABELS), empty.current.shapes
    found, scores, divergence = first_task(minilm, built, shapes, random_adapter, data)
    assert (4.0 * divergence > 1e-3).all()
    expected = expected_losses(data, scores + 2.0 * SHARES.log(), divergence, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_equal_shares_adjust_nothing(minilm, empty):
    data = minilm.encode(DATA[:2], LABELS)
    plain = losses(minilm, empty, 0.0, TASK, data)
    torch.testing.assert_close(losses(minilm, empty, 3.0, TASK, data), plain, rtol=1e-5, atol=1e-6)


def test_where_single_records_are_protected_it_is_refused():
    """A loss that knows the shares knows all records; only its own may be in a clipped gradient."""
    adjusted = MethodConfig(logit_adjustment=0.1)
    for mechanism, refused in (("record", True), ("none", False)):
        privacy = PrivacyConfig(mechanism=mechanism)
        with pytest.raises(UserError, match="set it to 0") if refused else nullcontext():
            make_mechanism(Experiment(method=adjusted, privacy=privacy))
    make_mechanism(Experiment(privacy=PrivacyConfig(mechanism="record")))


def test_several_tasks_at_once_have_no_shares(minilm, empty):
    data = minilm.encode(DATA, LABELS)
    both = replace(TASK, joint_tasks=(TaskDataset(LABELS, data), TaskDataset(SEEN, ())))
    plain = losses(minilm, empty, 0.0, both, data)
    assert torch.equal(losses(minilm, empty, 1.0, both, data), plain)


def test_the_adjustment_reaches_the_gradients(minilm, empty):
    data = minilm.encode(DATA, LABELS)

    def trained(strength):
        built = deal(strength)
        state = built.begin_task(empty, seeded(0))
        load_state(minilm, state)
        objective = built.objective(minilm, state, TASK, data, Cache())
        both = frozenset({"lora_A", "lora_B"})
        train(minilm, objective, data, both, 2, TrainConfig(), seeded(0, "train"))
        return next(iter(read(minilm.module).layers.values())).B

    assert not torch.equal(trained(0.0), trained(1.0))


def test_only_deal_adjusts(minilm, empty):
    data = minilm.encode(DATA, LABELS)
    for name in ("sequential", "lwf", "olora"):
        built = make_method(MethodConfig(name=name, logit_adjustment=1.0), AdapterConfig())
        state = built.begin_task(empty, seeded(0))
        load_state(minilm, state)
        with torch.no_grad():
            found = built.objective(minilm, state, TASK, data, Cache()).example_losses(range(3))
            expected = cross_entropy(minilm.scores(data, LABELS), TARGETS, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
