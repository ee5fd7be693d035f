from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from deal_core.config.experiment import ModelConfig
from deal_core.data import Example
from deal_core.deal.distillation import ask
from deal_core.errors import UserError
from deal_core.lora.attach import at_task_start
from deal_core.methods import TaskPrompt
from deal_core.models import load_model

LABELS = ("red", "blue_green", "green")
EXAMPLES = [
    Example("a b", "red"),
    Example("c c c c d", "blue_green"),
    Example("d", "green"),
    Example("a b a b a b", "red"),
]
WRITTEN = [Example("a b", "", target="red red blue"), Example("d d d", "", target="green")]


def config_of(folder, **changes) -> ModelConfig:
    return ModelConfig(family="seq2seq-lm", name=str(folder), **changes)


@pytest.fixture
def model(seq2seq_folder, small_adapter):
    return load_model(config_of(seq2seq_folder, max_new_tokens=4), small_adapter, 32)


def ids_of(folder, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def answer_ids(folder, label: str) -> list[int]:
    return ids_of(folder, label.replace("_", " "))


@lru_cache(maxsize=1)
def loaded(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()


def plain_logits(folder, prompt, answer) -> torch.Tensor:
    """One sequence at a time through the bare model: the obvious slow way. The last row predicts
    what follows the answer."""
    bare = loaded(folder)
    mark = ids_of(folder, "<s>") if bare.config.model_type == "bart" else []
    start = [bare.config.decoder_start_token_id, *mark]
    with torch.no_grad():
        logits = bare(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[*start, *answer]])
        ).logits[0]
    return logits[len(start) - 1 :]


def plain_log_likelihoods(folder, prompt, answer) -> torch.Tensor:
    rows = plain_logits(folder, prompt, answer)[:-1]
    return -cross_entropy(rows, torch.tensor(answer), reduction="none")


def test_scores_are_length_normalised_log_likelihoods(model, seq2seq_folder, monkeypatch):
    batch = model.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        scores = model.scores(batch, LABELS)
        monkeypatch.setattr("deal_core.models.seq2seq.SCORING_TOKENS", 1)  # passes change nothing
        torch.testing.assert_close(model.scores(batch, LABELS), scores, rtol=0, atol=1e-5)
    for i, item in enumerate(batch):
        for j, label in enumerate(LABELS):
            answer = answer_ids(seq2seq_folder, label)
            assert len(answer) == len(label.split("_"))
            expected = plain_log_likelihoods(seq2seq_folder, item.tokens, answer).mean()
            torch.testing.assert_close(scores[i, j], expected, rtol=0, atol=1e-4)
    assert scores.std(dim=0).max() > 0.01  # the text is read


def test_a_text_is_read_once_for_all_its_labels(model, monkeypatch):
    batch = model.encode(EXAMPLES, LABELS)
    monkeypatch.setattr("deal_core.models.seq2seq.SCORING_TOKENS", 1)
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


def test_example_loss_is_the_mean_over_its_own_answer_and_the_end(model, seq2seq_folder):
    end = ids_of(seq2seq_folder, "</s>")
    labelled, written = model.encode(EXAMPLES, LABELS), model.encode(WRITTEN, ())
    texts = [example.label for example in EXAMPLES], [example.target for example in WRITTEN]
    for batch, labels, answers in ((labelled, LABELS, texts[0]), (written, (), texts[1])):
        with torch.no_grad():
            losses = model.forward_train(batch, labels, ()).example_losses
        for item, answer, loss in zip(batch, answers, losses, strict=True):
            ids = answer_ids(seq2seq_folder, answer) + end
            expected = -plain_log_likelihoods(seq2seq_folder, item.tokens, ids).mean()
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)


def test_the_prompt_stands_between_what_the_tokeniser_puts_around_a_text(model, seq2seq_folder):
    (item,) = model.encode([Example("a b", "red")], LABELS)
    prompt = "Classify the text. Answer with one of the options.\nOptions: red, blue green, green\nText: a b\nAnswer:"  # noqa: E501
    assert list(item.tokens) == AutoTokenizer.from_pretrained(seq2seq_folder)(prompt)["input_ids"]


def greedy_words(folder, prompt, longest: int) -> list[int]:
    """Word by word, each time the whole answer anew."""
    (end,) = ids_of(folder, "</s>")
    answer: list[int] = []
    while len(answer) < longest and end not in answer:
        answer.append(int(plain_logits(folder, prompt, answer)[-1].argmax()))
    return answer


@pytest.mark.parametrize("seq2seq_folder", ["t5", "bart"], indirect=True)
def test_it_writes_the_likeliest_word_each_time(model, seq2seq_folder):
    tokenizer = AutoTokenizer.from_pretrained(seq2seq_folder)
    batch = model.encode(WRITTEN, ())
    for item, text in zip(batch, model.write(batch), strict=True):
        words = greedy_words(seq2seq_folder, item.tokens, 4)
        assert text == tokenizer.decode(words, skip_special_tokens=True).strip()
    assert [item.right for item in batch] == [(example.target,) for example in WRITTEN]


def test_the_teacher_answers_the_prompts_of_earlier_tasks(model, seq2seq_folder):
    earlier = (TaskPrompt(("a", "b c"), "Text with one of"), TaskPrompt((), "Answer the text"))
    batch = model.encode(EXAMPLES, LABELS)
    asked, teacher = ask(model, batch, earlier)
    tokenizer = AutoTokenizer.from_pretrained(seq2seq_folder)
    (end,) = ids_of(seq2seq_folder, "</s>")
    for n, item in enumerate(asked):
        prompt, text = earlier[n % 2], EXAMPLES[n].text
        example = Example(text, *prompt.labels[:1]) if prompt.labels else Example(text, "", target="a")  # fmt: skip  # noqa: E501
        (alone,) = model.encode([example], prompt.labels, prompt.instruction)
        assert item.tokens == alone.tokens
        with at_task_start(model.module):
            if prompt.labels:
                best = prompt.labels[int(model.scores([alone], prompt.labels).argmax())]
                assert item.answer == (*answer_ids(seq2seq_folder, best), end)
            else:
                (written,) = model.write([alone])
                assert tokenizer.decode(item.answer, skip_special_tokens=True).strip() == written
        assert teacher([n])[0].shape == (len(item.answer), len(tokenizer))


@pytest.mark.parametrize("seq2seq_folder", ["t5"], indirect=True)
def test_words_with_other_scores_are_refused(seq2seq_folder, small_adapter, monkeypatch):
    monkeypatch.setattr("deal_core.models.seq2seq.state_factor", lambda base: 1.0)
    with pytest.raises(UserError, match="seq2seq-lm cannot follow"):
        load_model(config_of(seq2seq_folder), small_adapter, 32)
