import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from deal_core.models.fast.attention import register_attention
from deal_core.models.fast.lower_layers import LowerLayers
from deal_core.models.fast.prompt_forest import PromptRow, decode, plant

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50),
}
ROWS = [
    PromptRow((1, 2, 3), (4, 5), ((6,), (7, 8))),
    PromptRow((1, 2, 3), (9, 10, 11, 12, 13, 14, 15), ((6,), ())),
    PromptRow((20, 21), (4, 5, 6)),
    PromptRow((1, 2, 3), (30,), ((31, 32, 33),)),
    PromptRow((), (40, 41, 42, 43)),
]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        CONFIGS[request.param], attn_implementation=register_attention()
    ).eval()


def alone(model, tokens):
    """The obvious slow way: one sequence, nothing shared, transformers' own attention."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            ids = torch.tensor([tokens])
            return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.set_attn_implementation(implementation)


def check(model, states, rows):
    forest, place = plant(rows)
    for old, new in enumerate(place):
        row = rows[old]
        assert forest.rows[new] == row
        start = forest.starts[new]
        expected = alone(model, row.head + row.body)
        found = states[start : start + len(row.body)]
        torch.testing.assert_close(found, expected[len(row.head) :], rtol=1e-4, atol=1e-5)
        for number, branch in enumerate(row.branches):
            expected = alone(model, row.head + row.body + branch)
            found = states[forest.predicting(new, number)]
            torch.testing.assert_close(
                found, expected[len(row.head + row.body) - 1 :], rtol=1e-4, atol=1e-5
            )


def test_every_prompt_and_answer_is_read_as_if_it_were_alone(model):
    forest, _ = plant(ROWS)
    with torch.no_grad():
        check(model, decode(model.get_decoder(), forest)[0], ROWS)


def lower_layers(model, below):
    decoder = model.get_decoder()
    layers = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    return LowerLayers(decoder, list(layers), below)


def test_what_the_lower_layers_made_once_serves_any_forest(model):
    decoder, lower = model.get_decoder(), lower_layers(model, 2)
    for rows in (ROWS[:2], ROWS, ROWS[::-1]):
        forest, _ = plant(rows)
        with torch.no_grad(), lower.replaced(lower.states(forest)):
            states = decode(decoder, forest)[0]
        check(model, states, rows)
    passes = []
    hook = lower.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    lower.states(plant(ROWS)[0])
    hook.remove()
    assert not passes


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_prompts_begin_with_has_a_pass_of_its_own(model, monkeypatch):
    """It serves every text: none may leave the rounding of a pass with itself in it."""
    lower, passes = lower_layers(model, 2), []
    carried = LowerLayers._pass

    def noted(self, rows):
        passes.append(list(rows))
        carried(self, rows)

    monkeypatch.setattr(LowerLayers, "_pass", noted)
    head, first, second = (3, 4, 5), (6, 7), (8, 9, 10)
    with torch.no_grad():
        for body in (first, second):
            lower.states(plant([PromptRow(head, body)])[0])
    alone = PromptRow(head, ())
    assert passes == [[alone], [PromptRow(head, first)], [PromptRow(head, second)]]


@pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)
def test_gradients_reach_what_is_shared(model):
    """The sum over separate prompts, through a head that they have in common."""
    embedding = model.get_input_embeddings().weight
    rows = [row for row in ROWS if not row.branches]
    rows += [PromptRow((20, 21), (7,)), PromptRow((20, 21), (8, 9))]
    forest, _ = plant(rows)
    states = decode(model.get_decoder(), forest)[0]
    states.square().sum().backward()
    together = embedding.grad.clone()
    embedding.grad = None
    for n, row in enumerate(forest.rows):
        ids = torch.tensor([row.head + row.body])
        out = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        first = n == 0 or forest.rows[n - 1].head != row.head
        counted = out if first else out[len(row.head) :]  # a head that is shared counts once
        counted.square().sum().backward()
    torch.testing.assert_close(together, embedding.grad, rtol=1e-3, atol=1e-4)
    embedding.grad = None


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_bounded_store_forgets_what_was_used_longest_ago(model, monkeypatch):
    decoder, lower = model.get_decoder(), lower_layers(model, 1)
    monkeypatch.setattr("deal_core.models.fast.lower_layers.CACHED_BYTES", 1500)
    for token in range(20):
        row = PromptRow((), (token, token + 1))
        forest, _ = plant([row])
        with torch.no_grad(), lower.replaced(lower.states(forest)):
            states = decode(decoder, forest)[0]
        check(model, states, [row])
        assert lower._bytes <= 1500
    assert len(lower._known) < 20
