"""Every family with several architectures: loaded, scored, trained, and per example."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import normalize

from deal_core.config.experiment import AdapterConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.lora.attach import read, write
from deal_core.models import adapter_shapes, auto_class, embedding_size, load_model
from deal_core.models.decoders import CausalLM
from deal_core.models.fast.attention import attention, register_attention
from deal_core.training.evaluation import base_embeddings
from tests.architectures import OF_ATTENTION, REFUSED, WORKING, model_config, save

LABELS = ("red", "blue_green", "green")
EXAMPLES = [
    Example("a b", "red"),
    Example("c c c c d a b c d a b c d", "blue_green"),
    Example("d", "green"),
    Example("a b a b a b", "red"),
]


@pytest.fixture(scope="module", params=WORKING)
def case(request, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp(request.param), request.param)
    config = model_config(folder, request.param)
    adapter = AdapterConfig(rank=4)
    return load_model(config, adapter, 32), config, adapter


def test_scores_are_finite_and_those_of_each_text_alone(case):
    model, _, _ = case
    data = model.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        scores = model.scores(data, LABELS)
        alone = torch.cat([model.scores([item], LABELS) for item in data])
        one_label = torch.cat([model.scores(data, [label]) for label in LABELS], dim=1)
    assert scores.isfinite().all()
    assert scores.std(dim=0).max() > 1e-3
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, one_label, rtol=0, atol=1e-4)


def test_an_adapter_is_read_as_it_was_written(case, random_adapter):
    model, config, adapter = case
    before = read(model.module)
    assert before.shapes == adapter_shapes(config, adapter)
    data = model.encode(EXAMPLES, LABELS)
    other = random_adapter(before.shapes, 4, 0.3, 5)
    with torch.no_grad():
        untouched = model.scores(data, LABELS)
        write(model.module, other)
        found, changed = read(model.module), model.scores(data, LABELS)
        write(model.module, before)
        back = model.scores(data, LABELS)
    for name, factors in other.layers.items():
        assert torch.equal(found.layers[name].A, factors.A)
        assert torch.equal(found.layers[name].B, factors.B)
    assert (changed - untouched).abs().max() > 1e-3
    assert torch.equal(back, untouched)


@pytest.mark.parametrize(("name", "expected"), OF_ATTENTION.items())
def test_without_a_default_of_peft_queries_and_values_are_adapted(name, expected, tmp_path):
    config = model_config(save(tmp_path, name), name)
    shapes = adapter_shapes(config, AdapterConfig())
    assert [*dict.fromkeys(layer.rpartition(".")[2] for layer in shapes)] == expected
    said = json.dumps(expected)
    with pytest.raises(UserError, match="names no linear layers") as refused:
        adapter_shapes(config, AdapterConfig(target_modules=("nope",)))
    assert str(refused.value).endswith(f": try {said}")
    assert all(f" {leaf}," in str(refused.value) for leaf in expected)


@pytest.mark.parametrize("name", REFUSED)
def test_an_attention_that_cannot_be_replaced_is_refused_in_one_line(name, tmp_path):
    config = model_config(save(tmp_path, name), name)
    with pytest.raises(UserError) as refused:
        load_model(config, AdapterConfig(), 32)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_attention_that_overlooks_how_prompts_lie_is_refused(name, tmp_path, monkeypatch):
    config = model_config(save(tmp_path, name), name)
    adapter = AdapterConfig()
    load_model(config, adapter, 32, torch.bfloat16)
    monkeypatch.setattr(
        "deal_core.models.fast.attention.attention",
        lambda *args, forest=None, **options: attention(*args, **options),
    )
    with pytest.raises(UserError, match="causal-lm cannot follow"):
        load_model(config, adapter, 32, torch.bfloat16)
    monkeypatch.undo()
    register_attention()


@pytest.mark.parametrize("upset", [4, 10_000])
def test_words_that_upset_a_model_do_not_refuse_it(upset, tmp_path, monkeypatch):
    own = CausalLM.own_logits

    def upset_by_the_first_words(self, item):
        logits = own(self, item)
        return (
            logits
            if min(item.tokens) > upset
            else logits
            + logits.std()
            * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
        )

    monkeypatch.setattr(CausalLM, "own_logits", upset_by_the_first_words)
    config = model_config(save(tmp_path, "llama"), "llama")
    all_words = upset == 10_000
    with pytest.raises(UserError, match="cannot follow") if all_words else nullcontext():
        load_model(config, AdapterConfig(), 32, torch.bfloat16)


@pytest.mark.parametrize(("name", "kept"), [("bert", "deal"), ("mpnet", "eager")])
def test_an_encoder_with_an_attention_of_its_own_keeps_it(name, kept, tmp_path):
    config = model_config(save(tmp_path, name), name)
    base = load_model(config, AdapterConfig(), 32).module.get_base_model()
    assert base.config._attn_implementation == kept


def test_an_encoder_that_overlooks_padding_is_refused(tmp_path, monkeypatch):
    config = model_config(save(tmp_path, "bert"), "bert")
    blind = lambda module, query, key, value, mask, **options: attention(  # noqa: E731
        module, query, key, value, None, **options
    )
    monkeypatch.setattr("deal_core.models.fast.attention.attention", blind)
    monkeypatch.setattr("transformers.models.bert.modeling_bert.eager_attention_forward", blind)
    with pytest.raises(UserError, match="padded text"):
        load_model(config, AdapterConfig(), 32)
    monkeypatch.undo()
    register_attention()


@pytest.mark.parametrize(
    ("name", "family"),
    [("t5", "encoder-labels"), ("bert", "causal-lm"), ("bert", "seq2seq-lm")],
)
def test_a_model_of_another_family_is_refused_in_one_line(name, family, tmp_path):
    config = model_config(save(tmp_path, name), name).model_copy(update={"family": family})
    with pytest.raises(UserError) as refused:
        load_model(config, AdapterConfig(), 32)
    assert "\n" not in str(refused.value)


def test_an_embedding_is_the_mean_of_a_texts_states_whatever_adapter_there_is(case, random_adapter):
    """The oracle: transformers alone, a text at a time, within its whole prompt."""
    model, config, _ = case
    before = read(model.module)
    write(model.module, random_adapter(before.shapes, 4, 0.3, 5))
    data = model.encode(EXAMPLES, LABELS)
    found = {layers: base_embeddings(model, data, layers) for layers in (1, 3)}
    write(model.module, before)
    base = auto_class(config).from_pretrained(config.name).eval()
    reader = base.get_encoder() if config.family == "seq2seq-lm" else base
    for place, item in enumerate(data):
        with torch.no_grad():
            ids = torch.tensor([item.tokens])
            states = reader(input_ids=ids, output_hidden_states=True).hidden_states
        text = slice(item.shared, item.shared + len(item.text) if item.text else None)
        for layers, vectors in found.items():
            pooled = [normalize(s[0, text].mean(0), dim=0) for s in states[1:][: -layers - 1 : -1]]
            pairs = [sum(pooled[i : i + 2]) for i in range(0, len(pooled), 2)]
            expected = torch.cat([normalize(pair, dim=0) for pair in pairs]) / len(pairs) ** 0.5
            torch.testing.assert_close(vectors[place], expected, rtol=0, atol=1e-4)
            assert vectors.shape == (len(data), embedding_size(config, layers))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_embedding_of_a_text_without_tokens_is_made_of_its_own_prompt(name, tmp_path):
    """The template ends with the text: behind it lies another prompt, or nothing."""
    config = model_config(save(tmp_path, name), name)
    config = config.model_copy(update={"template": "{instruction}\n{options}\n{text}"})
    model = load_model(config, AdapterConfig(rank=4), 32)
    empty, *others = model.encode([Example("", "red"), Example("a b", "red")], LABELS)
    alone = base_embeddings(model, [empty])[0]
    assert alone.isfinite().all()
    for data in ([empty, *others], [*others, empty]):
        found = base_embeddings(model, data)[data.index(empty)]
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
