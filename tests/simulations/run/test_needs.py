"""What a run asks of the machine, as the check says it."""

import torch
from transformers import BertConfig, BertModel

from simulations.run import needs
from simulations.run.needs import check_needs, memory_of, training_work
from tests.conftest import experiment_with

BASE = BertModel(
    BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
)
SETTINGS = ("train.batch_size=4", "train.max_length=16", "data.max_train=40", "data.max_test=8")


def test_memory_is_of_weights_and_of_what_a_pass_keeps():
    experiment = experiment_with(*SETTINGS)
    weights, training = memory_of(experiment, BASE, torch.float32)
    assert weights == 4 * sum(parameter.numel() for parameter in BASE.parameters())
    assert training == needs.KEPT * 4 * (4 * 16) * 3 * 32
    few_bits = experiment_with(*SETTINGS, "model.bits=4", "adapter.first_layer=2")
    assert memory_of(few_bits, BASE, torch.bfloat16) == (weights / 8, training / 2 / 3)


def test_work_grows_with_clients_and_epochs_as_it_should():
    one = training_work(experiment_with(*SETTINGS, "federation.clients=4"), BASE)
    half = training_work(experiment_with(*SETTINGS, "federation.clients=8"), BASE)
    twice = training_work(
        experiment_with(*SETTINGS, "federation.clients=4", "federation.local_epochs=2"), BASE
    )
    assert one > 0
    assert (half, twice) == (one / 2, 2 * one)
    weights = BASE.num_parameters() - BASE.embeddings.word_embeddings.weight.numel()
    assert one <= 4 * weights * 40 * 16 / 4


def test_a_machine_without_room_is_warned_of(monkeypatch):
    experiment = experiment_with(*SETTINGS)
    assert [finding.kind for finding in check_needs(experiment)] == ["note"]
    monkeypatch.setattr(needs, "free_bytes", lambda device: 10**6)
    assert [finding.kind for finding in check_needs(experiment)] == ["note", "warning"]
