"""Models that answer in words: against one sequence at a time through the bare model."""

from functools import lru_cache

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
)

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.models import check_label_tokens, load_model
from deal_core.models.decoders import causal_prompts
from deal_core.models.generating import WORDS, word_losses
from deal_core.models.prompt import dummy_prefix, read_template
from deal_core.randomness import seeded
from tests.architectures import EXAMPLES, LABELS, model_config, save

WRITTEN = [Example("a b", "", target="red red blue"), Example("d d d", "", target="green")]
CAUSAL = ("llama", "gpt2")


@pytest.fixture(scope="module", params=[*CAUSAL, "t5", "flan-t5", "bart"])
def config(request, make_causal, tmp_path_factory):
    """Of a decoder alone, whose tokeniser has no end, or of an encoder with a decoder."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in CAUSAL:
        return ModelConfig(family="causal-lm", name=str(make_causal(folder, request.param)))
    return model_config(save(folder, request.param), request.param, max_new_tokens=4)


@pytest.fixture(scope="module")
def model(config, small_adapter):
    return load_model(config, small_adapter, 32)


def ids_of(config, text):
    tokenizer = AutoTokenizer.from_pretrained(config.name)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_ids(config, label):
    """Where it continues the prompt, behind a space."""
    gap = " " if config.family == "causal-lm" else ""
    return ids_of(config, gap + label.replace("_", " "))


@lru_cache(maxsize=1)
def loaded(family, name):
    kind = AutoModelForCausalLM if family == "causal-lm" else AutoModelForSeq2SeqLM
    return kind.from_pretrained(name, attn_implementation="eager").eval()


def plain_logits(config, prompt, answer):
    """One sequence at a time through the bare model: the obvious slow way. The last row predicts
    what follows the answer."""
    bare = loaded(config.family, config.name)
    with torch.no_grad():
        if config.family == "causal-lm":
            return bare(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
        mark = ids_of(config, "<s>") if bare.config.model_type == "bart" else []
        start = [bare.config.decoder_start_token_id, *mark]
        rows = torch.tensor([[*start, *answer]])
        logits = bare(input_ids=torch.tensor([prompt]), decoder_input_ids=rows).logits[0]
    return logits[len(start) - 1 :]


def plain_log_likelihoods(config, prompt, answer):
    rows = plain_logits(config, prompt, answer)[:-1]
    return -cross_entropy(rows, torch.tensor(answer), reduction="none")


def test_scores_are_length_normalised_log_likelihoods(model, config, monkeypatch):
    batch = model.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        scores = model.scores(batch, LABELS)
        # Small passes change nothing.
        monkeypatch.setattr("deal_core.models.decoders.SCORING_TOKENS", 1)
        torch.testing.assert_close(model.scores(batch, LABELS), scores, rtol=0, atol=1e-5)
    for i, item in enumerate(batch):
        for j, label in enumerate(LABELS):
            answer = answer_ids(config, label)
            assert len(answer) == len(label.split("_"))
            expected = plain_log_likelihoods(config, item.tokens, answer).mean()
            torch.testing.assert_close(scores[i, j], expected, rtol=0, atol=1e-4)
    assert scores.std(dim=0).max() > 1e-3  # the text is read


def test_example_loss_is_the_mean_over_its_own_answer_and_the_end(model, config):
    """Independent of batch-mates, as per-example privacy needs it."""
    end = [] if config.family == "causal-lm" else ids_of(config, "</s>")
    labelled, written = model.encode(EXAMPLES, LABELS), model.encode(WRITTEN, ())
    texts = [example.label for example in EXAMPLES], [example.target for example in WRITTEN]
    for batch, labels, answers in ((labelled, LABELS, texts[0]), (written, (), texts[1])):
        with torch.no_grad():
            losses = model.forward_train(batch, labels, ()).example_losses
        for item, answer, loss in zip(batch, answers, losses, strict=True):
            ids = answer_ids(config, answer) + end
            expected = -plain_log_likelihoods(config, item.tokens, ids).mean()
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)


def greedy_words(config, prompt, longest, end):
    """Word by word, each time the whole answer anew."""
    answer = []
    while len(answer) < longest and end not in answer:
        answer.append(int(plain_logits(config, prompt, answer)[-1].argmax()))
    return answer


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_it_writes_the_likeliest_word_each_time(tmp_path, small_adapter, name):
    """Prompts of unequal lengths are in one batch; of the GPT-2 some answers end before others."""
    config = model_config(save(tmp_path, name), name, max_new_tokens=5)
    model = load_model(config, small_adapter, 32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = ("a b", "c c c c d", "d", "a b a b a b a b", "b d a", "red", "blue a . , d")
    batch = model.encode([Example(text, "", target="a") for text in texts], ())
    assert len({len(item.tokens) for item in batch}) > 3
    expected = [greedy_words(config, item.tokens, 5, tokenizer.eos_token_id) for item in batch]
    assert model.written(batch) == [tuple(words) for words in expected]
    assert len({len(words) for words in expected}) > 1 or name != "gpt2"
    said = [tokenizer.decode(words, skip_special_tokens=True).strip() for words in expected]
    assert model.write(batch) == said


def test_what_is_cut_of_an_answer_has_no_end(tmp_path, small_adapter):
    folder = save(tmp_path, "llama")
    model = load_model(model_config(folder, "llama", max_new_tokens=4), small_adapter, 32)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    targets = ("a b c", "a b c d", "a b c d a")
    items = model.encode([Example("a", "", target=t) for t in targets], ())
    assert [item.right for item in items] == [(target,) for target in targets]
    answers = [item.answer for item in items]
    assert [answer.count(end) for answer in answers] == [1, 1, 0]
    assert [len(answer) for answer in answers] == [4, 5, 4]
    assert answers[2] == answers[1][:-1]


def test_a_label_that_begins_as_another_does_is_scored_with_its_end(tmp_path, small_adapter):
    """Else 'blue' has all that 'blue green' begins with, and is the answer whatever is learnt."""
    config = model_config(save(tmp_path, "llama"), "llama")
    model = load_model(config, small_adapter, 32)
    labels = ("blue", "blue_green", "red")
    (item,) = model.encode([Example("c c d", "blue_green")], labels)
    end = AutoTokenizer.from_pretrained(config.name).eos_token_id
    with torch.no_grad():
        scores = model.scores([item], labels)[0]
        sums = model.log_likelihoods([item], labels)[0]
        alone = model.scores([item], ("blue", "red"))[0]
    for j, label in enumerate(labels):
        plain = plain_log_likelihoods(config, item.tokens, [*answer_ids(config, label), end])
        torch.testing.assert_close(scores[j], plain.mean(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sums[j], plain.sum(), rtol=0, atol=1e-5)
    plain = plain_log_likelihoods(config, item.tokens, answer_ids(config, "blue"))
    torch.testing.assert_close(alone[0], plain.mean(), rtol=0, atol=1e-5)


def test_labels_that_the_tokeniser_cannot_tell_apart_are_refused(make_causal, tmp_path):
    config = ModelConfig(family="causal-lm", name=str(make_causal(tmp_path, "llama")))
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


def test_an_instruction_with_a_place_for_the_text_is_the_whole_prompt_of_its_task():
    template = read_template("{instruction}\nOptions: {options}\nText: {text}\nAnswer:")
    assert template.around("Say.", ("a", "b")) == ("Say.\nOptions: a, b\nText: ", "\nAnswer:")
    own = "Note: {text}\nSummary:"
    assert template.around(own, ()) == ("Note: ", "\nSummary:")
    assert template.around("One of {options}?\n{text}\n", ("a", "b")) == ("One of a, b?\n", "\n")
    for wrong in ("{text} {text}", "{text} {options}", "{instruction} {text}"):
        with pytest.raises(ValueError, match="needs"):
            template.around(wrong, ("a",))


@pytest.mark.parametrize("config", CAUSAL, indirect=True)
def test_writing_repeats_the_head_for_no_text(model):
    """The last states of prompts are a view with gaps: a product with one takes the matrix once for
    every text, which in bfloat16 is a copy of 54 MB each in the embedded model."""
    head, laid_out = model.module.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(
        lambda _, states: laid_out.append(states[0].is_contiguous())
    )
    model.write(model.encode([Example("a b", "", target="a"), Example("d", "", target="a")], ()))
    hook.remove()
    assert laid_out
    assert all(laid_out)


@pytest.mark.parametrize("config", ["t5", "bart"], indirect=True)
def test_a_text_is_read_once_for_all_its_labels(model, monkeypatch):
    batch = model.encode(EXAMPLES, LABELS)
    monkeypatch.setattr("deal_core.models.decoders.SCORING_TOKENS", 1)
    base, seen = model.module.get_base_model(), []
    keys = ("EncDecAttention.k", "encoder_attn.k_proj")
    cross = [module for name, module in base.named_modules() if name.endswith(keys)]
    handles = [
        module.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
        for module in cross
    ]
    handles.append(base.get_encoder().register_forward_hook(lambda *_: seen.append("encoder")))
    with torch.no_grad():
        model.scores(batch, LABELS)
    for handle in handles:
        handle.remove()
    assert len(cross) == 2
    assert seen == ["encoder", 1, 1] * len(batch)


@pytest.mark.parametrize("config", ["t5", "bart"], indirect=True)
def test_the_prompt_stands_between_what_the_tokeniser_puts_around_a_text(model, config):
    (item,) = model.encode([Example("a b", "red")], LABELS)
    prompt = "Classify the text. Answer with one of the options.\nOptions: red, blue green, green\nText: a b\nAnswer:"  # noqa: E501
    assert list(item.tokens) == AutoTokenizer.from_pretrained(config.name)(prompt)["input_ids"]


@pytest.mark.parametrize("config", ["t5"], indirect=True)
def test_words_with_other_scores_are_refused(config, small_adapter, monkeypatch):
    monkeypatch.setattr("deal_core.models.decoders.state_factor", lambda base: 1.0)
    with pytest.raises(UserError, match="seq2seq-lm cannot follow"):
        load_model(config, small_adapter, 32)


HIDDEN, VOCABULARY = 8, 500


def rows(words):
    """A head, states with a gradient, and the right words."""
    generator = seeded("word losses", words)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    states = torch.randn(words, HIDDEN, generator=generator, requires_grad=True)
    return head, states, torch.randint(VOCABULARY, (words,), generator=generator)


def with_gradient(words, parts):
    """Losses, the states' gradient, how many words each call had, and the floats kept for it."""
    head, states, wanted = rows(words)
    calls = []
    kept = {}

    def losses(some, targets):
        calls.append(len(some))
        return cross_entropy(some @ head.T, targets, reduction="none")

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = word_losses(losses, states, wanted) if parts else losses(states, wanted)
    held = sum(kept.values())
    (found * torch.arange(1.0, words + 1)).sum().backward()
    assert states.grad is not None
    return found.detach(), states.grad, calls, held


def test_losses_and_gradients_are_those_of_all_words_at_once():
    for words in (1, WORDS, WORDS + 1, 3 * WORDS + 5):
        found, gradient, calls, _ = with_gradient(words, parts=True)
        expected, wanted, _, _ = with_gradient(words, parts=False)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, wanted)
        assert max(calls) <= WORDS


def test_nothing_of_the_size_of_a_vocabulary_is_kept_for_backward():
    words = 4 * WORDS
    assert with_gradient(words, parts=False)[3] > words * VOCABULARY
    assert with_gradient(words, parts=True)[3] < words * VOCABULARY / 10
