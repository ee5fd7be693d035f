import math

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.data.embedded import asset_folder
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, zero_adapter
from deal_core.lora.attach import CURRENT, set_trainable
from deal_core.lora.state import State
from deal_core.models import embedding_size, load_model
from deal_core.models.interface import Memo
from deal_core.training.loop import load_state

LABELS = ("Anatomy", "Social_Preventive Medicine", "Surgery")
EXAMPLES = [
    Example("Which nerve supplies the diaphragm?", "Anatomy"),
    Example("Best suture for bowel anastomosis", "Surgery"),
    Example("A vaccine is given to the whole village at birth, in order to", LABELS[1]),
]


@pytest.fixture
def state(shapes, random_adapter):
    """With something in every adapter."""

    def draw(rank, scaling):
        layers = random_adapter(shapes, rank, scaling, rank).layers
        return Adapter({n: LoraFactors(0.05 * f.A, 0.05 * f.B) for n, f in layers.items()}, scaling)

    return State(draw(8, 2.0), draw(16, 1.0), draw(3, 1.0))


def bare_minilm():
    return AutoModel.from_pretrained(str(asset_folder("minilm"))).eval()


def cosines(model):
    """Scores of the examples by ``model``, of labels by the base model: each text alone."""
    tokenizer, base = AutoTokenizer.from_pretrained(str(asset_folder("minilm"))), bare_minilm()

    def embed(module, text):
        with torch.no_grad():
            states = module(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return normalize(states.mean(1), dim=1)[0]

    texts = torch.stack([embed(model, example.text) for example in EXAMPLES])
    names = torch.stack([embed(base, label.replace("_", " ")) for label in LABELS])
    return 20.0 * texts @ names.T


@pytest.fixture
def clean(minilm, shapes):
    load_state(minilm, State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)))
    return minilm


def test_zero_shot_scores_are_the_base_models_cosines(clean):
    batch = clean.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        found = clean.scores(batch, LABELS)
    torch.testing.assert_close(found, cosines(bare_minilm()), rtol=0, atol=1e-4)


def test_a_labels_vector_is_the_same_to_the_bit_whatever_it_is_asked_with(clean):
    labels = [f"{word} {number}" for word in ("skin", "heart failure") for number in range(4)]
    together = clean.label_vectors(labels)
    apart = load_model(ModelConfig(), AdapterConfig(), 128)
    found = torch.cat([apart.label_vectors(labels[n::3]) for n in range(3)])
    assert torch.equal(found, torch.cat([together[n::3] for n in range(3)]))


def test_learn_gives_each_example_its_own_cross_entropy(clean):
    batch = clean.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        learnt = clean.forward_train(batch, LABELS, [["Dental", "Skin"], ["Skin"]])
        scores = clean.scores(batch, [*LABELS, "Dental", "Skin", "Skin"])
    expected = [-scores[i, :3].log_softmax(0)[item.target] for i, item in enumerate(batch)]
    torch.testing.assert_close(learnt.example_losses, torch.stack(expected))
    torch.testing.assert_close(learnt.distillation_logits, scores[:, 3:])
    assert learnt.spaces == [2, 1]


def test_the_state_acts_as_one_sum_on_the_frozen_weights(minilm, shapes, state):
    """Merged retained adapter and residual, unmerged current one: equal to all merged."""
    load_state(minilm, state)
    merged = bare_minilm()
    for name in shapes:
        weight = merged.get_submodule(name).weight.data
        for part in state.parts():
            weight += part.scaling * part.layers[name].B @ part.layers[name].A
    batch = minilm.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        ours = minilm.scores(batch, LABELS)
    torch.testing.assert_close(ours, cosines(merged), rtol=0, atol=1e-3)


def test_an_embedding_of_several_layers_has_neighbours_averaged(clean):
    """(M44), from the states of a bare model, one text at a time: padded and alone are the same."""
    bare, batch, units = bare_minilm(), clean.encode(EXAMPLES, LABELS), []
    for item in batch:
        with torch.no_grad():
            states = bare(torch.tensor([item.tokens]), output_hidden_states=True).hidden_states
        units.append([normalize(layer[0].mean(0), dim=0) for layer in states])
    for layers, pairs in ((1, [(6,)]), (3, [(6, 5), (4,)]), (4, [(6, 5), (4, 3)])):
        expected = [
            torch.cat([normalize(sum(unit[layer] for layer in pair), dim=0) for pair in pairs])
            for unit in units
        ]
        for texts in (slice(0, 3), slice(0, 1)):
            with torch.no_grad():
                found = clean.embed(batch[texts], layers)
            wanted = torch.stack(expected[texts]) / math.sqrt(len(pairs))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            assert found.shape[1] == embedding_size(ModelConfig(), layers)


def test_only_the_chosen_factors_of_the_current_adapter_get_gradients(minilm, state):
    load_state(minilm, state)
    for factors in (frozenset({"lora_B"}), frozenset({"lora_A"}), frozenset({"lora_A", "lora_B"})):
        chosen = set_trainable(minilm.module, factors)
        assert len(chosen) == 12 * len(factors)
        minilm.forward_train(
            minilm.encode(EXAMPLES, LABELS), LABELS, ()
        ).example_losses.mean().backward()
        for name, parameter in minilm.module.named_parameters():
            expected = any(f".{factor}.{CURRENT}." in name for factor in factors)
            assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name
            parameter.grad = None


def test_user_errors_are_one_line():
    with pytest.raises(UserError, match="did you mean 'minilm'"):
        load_model(ModelConfig(name="embedded:minilmm"), AdapterConfig(), 32)
    with pytest.raises(UserError, match=r"unknown model\.family"):
        load_model(ModelConfig(family="encoder"), AdapterConfig(), 32)


def test_behind_an_encoder_that_never_changes_each_text_is_read_once_and_alone(monkeypatch):
    """Beside others a text would be rounded otherwise, and depend on them."""
    model = load_model(ModelConfig(), AdapterConfig(kind="pooled"), 32)
    batch, passes, embed = model.encode(EXAMPLES, LABELS), [], type(model)._embed

    def counted(self, token_ids, layers=1):
        passes.append([*token_ids])
        return embed(self, token_ids, layers)

    monkeypatch.setattr(type(model), "_embed", counted)
    with torch.no_grad():
        first = model.embed([*batch, batch[0]])
        again = model.embed(batch[::-1])
    assert passes == [[item.tokens] for item in batch]
    assert torch.equal(first[:3], again.flip(0))
    assert torch.equal(first[0], first[3])


def test_what_is_kept_is_bounded():
    made = []
    memo = Memo(lambda keys: [made.append(key) or key + 1 for key in keys], 3)
    assert memo([1, 2, 1]) == [2, 3, 2]
    assert memo([2]) == [3]
    assert made == [1, 2]
    assert memo([1, 2, 3]) == [2, 3, 4]
    assert made == [1, 2, 1, 2, 3]
