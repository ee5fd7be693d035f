"""What a model says of one text does not follow from others: a record's noise covers that record
alone."""

import json

import pytest

from client import runtime as resources
from client.runtime import ClientRuntime
from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.errors import UserError
from deal_core.lora.attach import lora_layers
from deal_core.models import adapter_shapes, load_model
from deal_core.models.interface import require_stateless

LENGTH = 64


def load(folder, family="causal-lm"):
    return load_model(ModelConfig(family=family, name=str(folder)), AdapterConfig(rank=2), LENGTH)


def llama(folder, make_causal, places):
    """A model trained on 32 places, asked about texts of 64."""
    path = make_causal(folder, "llama") / "config.json"
    config = json.loads(path.read_text())
    config["max_position_embeddings"] = 32
    config["rope_parameters"] = {"rope_type": places, "factor": 8.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["causal-lm", "encoder-labels"])
def test_places_that_follow_the_longest_text_are_refused(tmp_path, make_causal, family):
    folder = llama(tmp_path, make_causal, "dynamic")
    with pytest.raises(UserError, match="rotary places are of the kind 'dynamic'"):
        load(folder, family)
    (folder / "model.safetensors").unlink()  # nor are weights read to say so
    with pytest.raises(UserError, match="rotary places are of the kind 'dynamic'"):
        adapter_shapes(ModelConfig(family=family, name=str(folder)), AdapterConfig(rank=2))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_that_answer_in_words_keep_nothing(tmp_path, make_causal, kind):
    require_stateless(load(make_causal(tmp_path, kind)), kind, LENGTH)


def test_encoder_decoders_keep_nothing(seq2seq_folder):
    require_stateless(load(seq2seq_folder, "seq2seq-lm"), "tiny", LENGTH)


def test_encoders_keep_nothing(minilm):
    require_stateless(minilm, "minilm", LENGTH)


def counting(model):
    """Make a layer count what it reads."""
    layer = next(iter(lora_layers(model.module).values()))
    layer.seen = 0
    layer.register_forward_hook(lambda module, *_: setattr(module, "seen", module.seen + 1))


def test_what_a_layer_keeps_of_a_text_is_found(tmp_path, make_causal):
    model = load(make_causal(tmp_path, "llama"))
    counting(model)
    with pytest.raises(UserError, match=r"model\.name 'tiny': keeps something of each text"):
        require_stateless(model, "tiny", LENGTH)


@pytest.mark.parametrize(("mechanism", "refused"), [("none", False), ("record", True)])
def test_where_records_are_protected_such_a_model_is_not_used(
    make_experiment, monkeypatch, mechanism, refused
):
    def spoiled(*args):
        model = load_model(*args)
        counting(model)
        return model

    monkeypatch.setattr(resources, "load_model", spoiled)
    runtime = ClientRuntime(make_experiment(f"privacy.mechanism={mechanism}"))
    if not refused:
        assert runtime.model.module is not None
        return
    with pytest.raises(UserError, match="choose another model"):
        _ = runtime.model
