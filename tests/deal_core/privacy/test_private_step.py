"""A step under the mechanism ``record``: clipping, noise, Poisson samples, guards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.guards import UnsafeModel, require_plain_lora
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SecureNoise
from deal_core.training.loop import run_local_steps
from tests.deal_core.privacy.silence import Silence

LABELS = ["red", "green", "blue"]
BOTH = frozenset({"lora_A", "lora_B"})
ENCODER_TOKENS = ((101, 2540, 102), (101, 3096, 2003, 2009, 102), (101, 2146, 2966, 3160, 102))
CAUSAL_TOKENS = ((1, 3, 4), (1, 5, 6, 7, 8), (1, 9, 10, 11))


@pytest.fixture(scope="module", params=["encoder", "gpt2"])
def case(request, random_adapter, make_causal, tmp_path_factory):
    """A model with something in both factors, and three examples."""
    if request.param == "encoder":
        config, tokens = ModelConfig(), ENCODER_TOKENS
    else:
        folder = make_causal(tmp_path_factory.mktemp(request.param), request.param)
        config, tokens = ModelConfig(family="causal-lm", name=str(folder)), CAUSAL_TOKENS
    model = load_model(config, AdapterConfig(), 32, torch.float32)
    data = [Encoded(ids, i) for i, ids in enumerate(tokens)]
    write(model.module, random_adapter(read(model.module).shapes, 8, 0.01, seed=5))
    return model, data


def gradients(data, noise, **changes) -> PrivateGradients:
    given = {
        "sample_rate": 0.5,
        "noise_multiplier": 1.3,
        "max_grad_norm": 0.7,
        "steps": 3,
        "expected_batch": 4,
    }
    ids = [RecordId("task", row) for row in range(len(data))]
    return PrivateGradients(data=data, record_ids=ids, noise=noise, **{**given, **changes})


def taken(parameters) -> torch.Tensor:
    row = torch.cat([p.grad.flatten().double() for p in parameters])
    for p in parameters:
        p.grad = None
    return row


def one_by_one(objective, parameters, count):
    rows = []
    for i in range(count):
        objective.example_losses([i]).sum().backward()
        rows.append(taken(parameters))
    return rows


@pytest.mark.parametrize("trained", [{"lora_B"}, {"lora_A", "lora_B"}])
def test_without_noise_it_is_the_clipped_sum_of_a_loop_over_the_expected_batch(case, trained):
    model, data = case
    parameters = set_trainable(model.module, frozenset(trained))
    objective = Plain(model, LABELS, data)
    rows = one_by_one(objective, parameters, 3)
    bound = float(torch.stack(rows).norm(dim=1).median())
    quiet = gradients(data, Silence(), max_grad_norm=bound, expected_batch=4)
    quiet.accumulate(model.module, objective, [0, 1, 2])
    expected = sum(row * min(1.0, bound / float(row.norm())) for row in rows) / 4
    ours = taken(parameters)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4, 1e8])
def test_a_record_moves_the_sum_by_at_most_the_bound(case, scale):
    """Neighbours: with record 2 and without, the empty batch included. The tolerance is that of
    what is made of a noised sum: float32."""
    model, data = case
    parameters = set_trainable(model.module, BOTH)
    plain = Plain(model, LABELS, data)

    class Loud:
        def example_losses(self, batch):
            factor = torch.tensor([scale if i == 2 else 1.0 for i in batch])
            return plain.example_losses(batch) * factor

    quiet = gradients(data, Silence(), max_grad_norm=0.5, expected_batch=1)
    sums = {}
    for batch in [(), (2,), (0,), (0, 2)]:
        quiet.accumulate(model.module, Loud(), list(batch))
        sums[batch] = taken(parameters)
    assert not sums[()].any()
    assert float(sums[(2,)].norm()) <= 0.5 * (1 + 1e-6)
    assert float((sums[(0, 2)] - sums[(0,)]).norm()) <= 0.5 * (1 + 1e-6)


def test_the_penalty_comes_after_the_noise_and_is_not_clipped(case):
    model, data = case
    set_trainable(model.module, BOTH)
    seen = []

    class Pulled(Plain):
        def penalty(self):
            factors = require_plain_lora(self.model.module)
            seen.append(all(f.grad is not None for f in factors))
            return 1000 * sum(f.sum() for f in factors)

    source = gradients(data, Silence(), max_grad_norm=1e-3, steps=1)
    before = read(model.module)
    rate = TrainConfig(learning_rate=1e-3)
    run_local_steps(model, Pulled(model, LABELS, data), source, BOTH, rate)
    after = read(model.module)
    assert seen == [True]
    for name, factors in after.layers.items():  # Adam's first step: the sign of a gradient of 1000
        moved = factors.B - before.layers[name].B
        torch.testing.assert_close(moved, torch.full_like(moved, -1e-3), rtol=1e-3, atol=1e-6)
    write(model.module, before)


def test_what_learns_beside_lora_is_refused(case):
    model, data = case
    set_trainable(model.module, BOTH)
    stray = next(p for p in model.module.parameters() if not p.requires_grad and p.dim() == 1)
    stray.requires_grad_(True)
    try:
        with pytest.raises(UnsafeModel, match="no plain LoRA"):
            gradients(data, Silence()).accumulate(model.module, Plain(model, LABELS, data), [0])
    finally:
        stray.requires_grad_(False)


def test_a_lora_layer_of_another_kind_is_refused(case):
    model, _ = case
    set_trainable(model.module, BOTH)
    layer = next(iter(model.module.adapted_layers.values()))
    ours = layer.forward
    layer.forward = lambda x: x
    try:
        with pytest.raises(UnsafeModel, match="no plain LoRA layer"):
            require_plain_lora(model.module)
    finally:
        layer.forward = ours


def test_a_loss_that_reads_the_weights_themselves_is_refused(case):
    model, data = case
    parameters = set_trainable(model.module, BOTH)
    plain = Plain(model, LABELS, data)

    class Reads:
        def example_losses(self, batch):
            return plain.example_losses(batch) + parameters[0].sum()

    with pytest.raises(ValueError, match="factor itself"):
        gradients(data, Silence()).accumulate(model.module, Reads(), [0, 1])
    for parameter in parameters:
        parameter.grad = None


@pytest.mark.parametrize(("batch", "reason"), [([1, 1], "twice"), ([0, 1, 2], "larger than")])
def test_a_batch_that_is_no_sample_of_the_rate_is_refused(case, batch, reason):
    model, data = case
    set_trainable(model.module, BOTH)
    rare = gradients(data, Silence(), sample_rate=1e-6)
    with pytest.raises(UnsafeModel, match=reason):
        rare.accumulate(model.module, Plain(model, LABELS, data), batch)


def test_gradients_from_before_are_not_let_through(case):
    model, data = case
    parameters = set_trainable(model.module, BOTH)
    parameters[0].grad = torch.ones_like(parameters[0])
    with pytest.raises(ValueError, match="before those of the batch"):
        gradients(data, Silence()).accumulate(model.module, Plain(model, LABELS, data), [0])
    parameters[0].grad = None


def test_a_step_that_moves_nothing_is_noticed(case):
    model, data = case
    before = read(model.module)
    source = gradients(data, SecureNoise(), steps=1)
    objective = Plain(model, LABELS, data)
    with pytest.raises(UnsafeModel, match="changed nothing"):
        run_local_steps(model, objective, source, BOTH, TrainConfig(learning_rate=1e-30))
    write(model.module, before)
    source = gradients(data, SecureNoise(), steps=1)
    assert (
        run_local_steps(model, objective, source, BOTH, TrainConfig()).loss == 0.0
    )  # stays unknown
    write(model.module, before)


def test_an_adapter_that_is_not_read_back_whole_is_noticed(case, monkeypatch):
    model, data = case
    source = gradients(data, SecureNoise())
    source.finished(model, LABELS, data)
    half = read(model.module)
    layers = {n: replace(f, B=f.B / 2) for n, f in half.layers.items()}
    monkeypatch.setattr(
        "deal_core.privacy.guards.read", lambda module: replace(half, layers=layers)
    )
    with pytest.raises(UnsafeModel, match="not the model"):
        source.finished(model, LABELS, data)
    write(model.module, half)
