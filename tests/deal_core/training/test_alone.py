"""Texts that are asked about one by one: one that cannot be leaves the answers to the others."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.deal.distillation import make_teacher
from deal_core.models import embedding_size, load_model
from deal_core.training.evaluation import base_embeddings, embeddings_alone

LABELS = ("heart", "skin")
TEXTS = ("a beat", "a rash that itches", "a valve")


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(), AdapterConfig(rank=2), 16)


@pytest.fixture(scope="module")
def data(model):
    return model.encode([Example(text, LABELS[n % 2]) for n, text in enumerate(TEXTS)], LABELS)


def failing_on(monkeypatch: pytest.MonkeyPatch, model, name: str, tokens) -> None:
    """One method of the model fails where one text is among those it is asked about."""
    real = getattr(model, name)

    def asked(batch, *others):
        if any(item.tokens == tokens for item in batch):
            raise IndexError("too long")
        return real(batch, *others)

    monkeypatch.setattr(model, name, asked)


def test_an_embedding_that_fails_is_no_number(model, data, monkeypatch):
    size = embedding_size(ModelConfig(), 2)
    whole = embeddings_alone(model, data, 2, size)
    torch.testing.assert_close(whole, base_embeddings(model, data, 2), rtol=0, atol=1e-5)
    failing_on(monkeypatch, model, "embed", data[1].tokens)
    found = embeddings_alone(model, data, 2, size)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    assert embeddings_alone(model, data[1:2], 2, size).isnan().all()
    with pytest.raises(IndexError):
        base_embeddings(model, data, 2)


def test_a_teacher_that_fails_on_one_answers_about_the_others(model, data, monkeypatch):
    whole = make_teacher(model, data, LABELS, [LABELS], alone=True)
    failing_on(monkeypatch, model, "forward_train", data[1].tokens)
    found = make_teacher(model, data, LABELS, [LABELS], alone=True)
    for place in (0, 2):
        assert torch.equal(found([place])[0], whole([place])[0])
    with pytest.raises(KeyError):
        found([1])
    with pytest.raises(IndexError):
        make_teacher(model, data, LABELS, [LABELS])
