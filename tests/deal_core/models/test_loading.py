"""A base model has the weights of its checkpoint, and no others."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.errors import UserError
from deal_core.models import check_weights, load_model

ADAPTER = AdapterConfig(rank=2)


def without(folder, *keys):
    """Take weights out of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = {key: value for key, value in load_file(path).items() if key not in keys}
    save_file(tensors, path, {"format": "pt"})


def refusals(model):
    """What is said before a run, and when the model is loaded."""
    found = []
    for look in (lambda: check_weights(model), lambda: load_model(model, ADAPTER, 16)):
        with pytest.raises(UserError) as refusal:
            look()
        found.append(str(refusal.value))
    return found


def test_a_checkpoint_without_its_head_is_refused(tmp_path, make_causal, capfd):
    folder = make_causal(tmp_path / "llama", "llama")
    model = ModelConfig(family="causal-lm", name=str(folder))
    check_weights(model)
    load_model(model, ADAPTER, 16)
    without(folder, "lm_head.weight")
    early, late = refusals(model)
    assert early == late
    assert f"model.name '{folder}': this folder lacks 1 weights" in early
    assert "lm_head.weight" in early
    assert "\n" not in early
    assert "MISSING" not in "".join(capfd.readouterr())  # nor does transformers say it at length


@pytest.fixture
def encoder(tmp_path, make_causal):
    """A tiny BERT, with the word-level tokeniser of the tiny Llama."""
    folder = make_causal(tmp_path / "bert", "llama")
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def test_a_pooler_that_is_not_used_may_be_missing(encoder):
    model = ModelConfig(name=str(encoder))
    assert not any("pooler" in key for key in load_file(encoder / "model.safetensors"))
    check_weights(model)
    load_model(model, ADAPTER, 16)
