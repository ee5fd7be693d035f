from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.models import check_label_tokens, load_model
from deal_core.models.causal import causal_prompts
from deal_core.models.prompt import dummy_prefix
from tests.architectures import model_config, save

LABELS = ("red", "blue_green", "green")
EXAMPLES = [
    Example("a b", "red"),
    Example("c c c c d", "blue_green"),
    Example("d", "green"),
    Example("a b a b a b", "red"),
]


@pytest.fixture
def model(causal_folder, small_adapter):
    config = ModelConfig(family="causal-lm", name=str(causal_folder))
    return load_model(config, small_adapter, 32)


def ids_of(folder, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def answer_ids(folder, label: str) -> list[int]:
    return ids_of(folder, " " + label.replace("_", " "))


@lru_cache(maxsize=1)
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def plain_log_likelihoods(folder, prompt, answer) -> torch.Tensor:
    """One sequence at a time through the bare model: the obvious slow way."""
    bare = loaded(folder)
    with torch.no_grad():
        logits = bare(torch.tensor([[*prompt, *answer]])).logits[0]
    rows = logits[len(prompt) - 1 : len(prompt) + len(answer) - 1]
    return -cross_entropy(rows, torch.tensor(answer), reduction="none")


def test_scores_are_length_normalised_log_likelihoods(model, causal_folder, monkeypatch):
    batch = model.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        scores = model.scores(batch, LABELS)
    monkeypatch.setattr("deal_core.models.causal.SCORING_TOKENS", 1)  # small passes change nothing
    with torch.no_grad():
        torch.testing.assert_close(model.scores(batch, LABELS), scores, rtol=0, atol=1e-5)
    for i, item in enumerate(batch):
        for j, label in enumerate(LABELS):
            answer = answer_ids(causal_folder, label)
            assert len(answer) == len(label.split("_"))
            expected = plain_log_likelihoods(causal_folder, item.tokens, answer).mean()
            torch.testing.assert_close(scores[i, j], expected, rtol=0, atol=1e-5)


def test_a_label_that_begins_as_another_does_is_scored_with_its_end(tmp_path, small_adapter):
    """Else 'blue' has all that 'blue green' begins with, and is the answer whatever is learnt."""
    folder = save(tmp_path, "llama")
    model = load_model(model_config(folder, "llama"), small_adapter, 32)
    labels = ("blue", "blue_green", "red")
    (item,) = model.encode([Example("c c d", "blue_green")], labels)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    with torch.no_grad():
        scores = model.scores([item], labels)[0]
        sums = model.log_likelihoods([item], labels)[0]
        alone = model.scores([item], ("blue", "red"))[0]
    for j, label in enumerate(labels):
        plain = plain_log_likelihoods(folder, item.tokens, [*answer_ids(folder, label), end])
        torch.testing.assert_close(scores[j], plain.mean(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sums[j], plain.sum(), rtol=0, atol=1e-5)
    plain = plain_log_likelihoods(folder, item.tokens, answer_ids(folder, "blue"))
    torch.testing.assert_close(alone[0], plain.mean(), rtol=0, atol=1e-5)


def test_example_loss_is_the_mean_over_its_own_answer_tokens(model, causal_folder):
    """Independent of batch-mates: what per-example privacy will need."""
    batch = model.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        losses = model.forward_train(batch, LABELS, ()).example_losses
    for item, loss in zip(batch, losses, strict=True):
        answer = answer_ids(causal_folder, LABELS[item.target])
        expected = -plain_log_likelihoods(causal_folder, item.tokens, answer).mean()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def test_labels_that_the_tokeniser_cannot_tell_apart_are_refused(causal_folder):
    config = ModelConfig(family="causal-lm", name=str(causal_folder))
    check_label_tokens(config, LABELS)
    with pytest.raises(UserError, match="'violet' and 'ochre' are the same to"):
        check_label_tokens(config, ("red", "violet", "ochre"))
    with pytest.raises(UserError, match="'blue_green' begins as 'blue' does"):
        check_label_tokens(config, ("blue", "blue_green"))  # the tokeniser has no end
    with pytest.raises(UserError, match="has no token for it"):
        check_label_tokens(config, ("red", " "))
    check_label_tokens(ModelConfig(), ("red", " "))  # an encoder embeds names


def test_a_head_that_is_the_embeddings_as_well_is_not_adapted(make_causal, tmp_path):
    """What is merged into it would change what every word goes in as."""
    tied = ModelConfig(family="causal-lm", name=str(make_causal(tmp_path, "gpt2")))
    both = AdapterConfig(rank=2, target_modules=("c_attn", "lm_head"))
    with pytest.raises(UserError, match=r"'lm_head' has the weight of the input embeddings"):
        load_model(tied, both, 8)
    load_model(tied, AdapterConfig(rank=2, target_modules=("c_attn",)), 8)


def test_parts_of_a_prompt_are_those_of_the_whole_where_a_tokeniser_adds_a_space():
    """As Llama 2's and Mistral's: a space of its own before whatever it reads alone."""
    pieces = ["<unk>", "▁", "▁good", "▁fine", "▁Text", ":", "\n", "Answer", "▁a", "▁positive", "a"]
    unigram = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0)
    raw = Tokenizer(unigram)
    spaced = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence(spaced)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    config = ModelConfig(family="causal-lm", template="Text: {text}\nAnswer:")
    prompts = causal_prompts(tokenizer, None, config, 8)
    (item,) = prompts.encode([Example("good fine", "positive")], ("positive", "a"), "")
    whole = tokenizer("Text: good fine\nAnswer: positive", add_special_tokens=False)["input_ids"]
    assert [*item.tokens, *prompts.label("positive")] == whole
    assert 0 not in whole
    assert 1 not in whole
    assert dummy_prefix(ByT5Tokenizer()) is None  # which has a token for a space


def greedy_words(folder, prompt, longest: int, end: int) -> list[int]:
    """Word by word through the bare model, each time prompt and answer alone and anew."""
    bare = loaded(folder)
    answer: list[int] = []
    while len(answer) < longest and end not in answer:
        with torch.no_grad():
            logits = bare(torch.tensor([[*prompt, *answer]])).logits[0, -1]
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_writes_the_likeliest_word_each_time(tmp_path, small_adapter, name):
    """Prompts of unequal lengths are in one batch; of the GPT-2 some answers end before others."""
    folder = save(tmp_path, name)
    model = load_model(model_config(folder, name, max_new_tokens=5), small_adapter, 32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ("a b", "c c c c d", "d", "a b a b a b a b", "b d a", "red", "blue a . , d")
    batch = model.encode([Example(text, "", target="a") for text in texts], ())
    assert len({len(item.tokens) for item in batch}) > 3
    expected = [greedy_words(folder, item.tokens, 5, tokenizer.eos_token_id) for item in batch]
    assert model.written(batch) == [tuple(words) for words in expected]
    assert len({len(words) for words in expected}) > 1 or name == "llama"
    said = [tokenizer.decode(words, skip_special_tokens=True).strip() for words in expected]
    assert model.write(batch) == said


def test_what_is_cut_of_an_answer_has_no_end(tmp_path, small_adapter):
    folder = save(tmp_path, "llama")
    model = load_model(model_config(folder, "llama", max_new_tokens=4), small_adapter, 32)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    targets = ("a b c", "a b c d", "a b c d a")
    answers = [
        item.answer for item in model.encode([Example("a", "", target=t) for t in targets], ())
    ]
    assert [answer.count(end) for answer in answers] == [1, 1, 0]
    assert [len(answer) for answer in answers] == [4, 5, 4]
    assert answers[2] == answers[1][:-1]


def test_writing_repeats_the_head_for_no_text(model):
    """The last states of prompts are a view with gaps: a product with one takes the matrix once for
    every text, which in bfloat16 is a copy of 54 MB each in the embedded model."""
    head, laid_out = model.module.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _, states: laid_out.append(states[0].is_contiguous()))
    model.write(model.encode([Example("a b", "", target="a"), Example("d", "", target="a")], ()))
    assert laid_out
    assert all(laid_out)
