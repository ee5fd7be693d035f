"""Gradients per example in an encoder with a decoder (T5), against PEFT one example at a time.

What the other models lack: a decoder that reads the encoder's output, a bias by distance that all
examples share, embeddings that are also the output's weight, and two lengths per example.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from deal_core.config.experiment import AdapterConfig
from deal_core.lora.attach import CURRENT, attach, lora_layers, read, set_trainable, write
from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.interface import RecordId
from tests.deal_core.privacy.silence import Silence
from tests.deal_core.training.clipped import clipped_gradients

TARGETS = ("q", "v")
TEXTS = ((5, 9, 3, 1), (7, 1), (4, 8, 30, 21, 6, 17, 2, 1))
ANSWERS = ((11, 12, 1), (13, 14, 15, 16, 1), (18, 1))
"""The longest text is not the one with the longest answer."""
IGNORED = -100
UNCLIPPED = 1e3
"""A bound that no gradient here reaches."""
FACTORS = [{"lora_A"}, {"lora_B"}, {"lora_A", "lora_B"}]


def padded(rows, value) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


class Answering:
    """Mean loss over an example's own answer; ``weights`` of the losses."""

    def __init__(self, module, weights=(1.0, 1.0, 1.0)):
        self.module, self.weights = module, weights

    def example_losses(self, batch):
        texts, answers = [TEXTS[i] for i in batch], [ANSWERS[i] for i in batch]
        labels = padded(answers, IGNORED)
        logits = self.module(
            input_ids=padded(texts, 0),
            attention_mask=padded([[1] * len(text) for text in texts], 0),
            labels=labels,
        ).logits
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
        lengths = torch.tensor([len(answer) for answer in answers])
        return losses / lengths * torch.tensor([self.weights[i] for i in batch])


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        dropout_rate=0.1,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def module(base, random_adapter):
    """With something in both factors."""
    config = AdapterConfig(rank=4, target_modules=TARGETS)
    module = attach(copy.deepcopy(base), config, TaskType.SEQ_2_SEQ_LM).eval()
    write(module, random_adapter(read(module).shapes, 4, 0.5, seed=5))
    return module


@pytest.fixture(scope="module")
def plain(base, module):
    """The same model by PEFT alone."""
    config = LoraConfig(r=4, target_modules=list(TARGETS), task_type=TaskType.SEQ_2_SEQ_LM)
    plain = get_peft_model(copy.deepcopy(base), config).eval()
    for (name, ours), (also, theirs) in zip(
        lora_layers(module).items(), lora_layers(plain).items(), strict=True
    ):
        assert name == also
        theirs.scaling["default"] = ours.scaling[CURRENT]
        for factor in ("lora_A", "lora_B"):
            weight = getattr(ours, factor)[CURRENT].weight.detach().clone()
            getattr(theirs, factor)["default"].weight.data = weight
    return plain


def taken(parameters) -> torch.Tensor:
    """All gradients in one row; forgets them."""
    row = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return row


def loop(plain, trained) -> list[torch.Tensor]:
    """A gradient per example, each alone and without padding."""
    factors = [
        getattr(layer, factor)["default"].weight
        for layer in lora_layers(plain).values()
        for factor in sorted(trained)
    ]
    rows = []
    for i in range(len(TEXTS)):
        plain.zero_grad()
        Answering(plain).example_losses([i]).sum().backward()
        rows.append(taken(factors))
    return rows


def private_sum(module, parameters, bound) -> torch.Tensor:
    """What a private step adds its noise to."""
    data = [Encoded(text, 0) for text in TEXTS]
    step = PrivateGradients(
        record_ids=[RecordId("task", row) for row in range(len(data))],
        data=data,
        sample_rate=1.0,
        noise_multiplier=1.0,
        max_grad_norm=bound,
        steps=1,
        expected_batch=1.0,
        noise=Silence(),
    )
    step.accumulate(module, Answering(module), [0, 1, 2])
    return taken(parameters)


def test_the_model_has_what_is_put_to_the_test(module):
    names = list(lora_layers(module))
    for part in ("encoder.block.0", "decoder.block.1.layer.0.SelfAttention", "EncDecAttention"):
        for target in TARGETS:
            assert any(part in name and name.endswith(f".{target}") for name in names)
    t5 = module.get_base_model()
    assert t5.lm_head.weight is t5.shared.weight
    assert t5.encoder.block[0].layer[0].SelfAttention.has_relative_attention_bias
    assert t5.decoder.block[0].layer[0].SelfAttention.has_relative_attention_bias


@pytest.mark.parametrize("trained", FACTORS)
def test_an_example_among_others_has_the_gradient_that_it_has_alone(module, plain, trained):
    parameters = set_trainable(module, frozenset(trained))
    for i, expected in enumerate(loop(plain, trained)):
        alone = [float(i == k) for k in range(len(TEXTS))]
        norms = clipped_gradients(module, Answering(module, alone), [0, 1, 2], UNCLIPPED)
        ours = taken(parameters)
        assert float(expected.norm()) > 0.01
        assert [float(norm) > 0 for norm in norms] == [i == k for k in range(len(TEXTS))]
        assert float((ours - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("trained", FACTORS)
def test_the_sum_is_that_of_a_loop_that_clips_every_example(module, plain, trained):
    parameters = set_trainable(module, frozenset(trained))
    rows = loop(plain, trained)
    bound = float(torch.stack(rows).norm(dim=1).median())  # clips some, not all
    ours = private_sum(module, parameters, bound)
    expected = sum(row * min(1.0, bound / float(row.norm())) for row in rows)
    assert float((ours - sum(rows)).norm() / expected.norm()) > 0.01
    assert float((ours - expected).norm() / expected.norm()) <= 1e-5
