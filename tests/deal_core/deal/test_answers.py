"""The teacher is asked with the prompts of earlier tasks, and answers itself."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoTokenizer

from deal_core.config.experiment import AdapterConfig, DistillationConfig, MethodConfig, ModelConfig
from deal_core.data import Example
from deal_core.deal.distillation import (
    ask,
    which,
    word_teacher,
    words_distilled,
)
from deal_core.deal.interface import LocalTask, TaskPrompt
from deal_core.deal.objective import Plain
from deal_core.lora.adapter import compress
from deal_core.lora.attach import at_task_start, read, set_trainable
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.models import load_model
from deal_core.privacy import dpsgd
from deal_core.training.loop import Cache, load_state
from tests.architectures import EXAMPLES as FOUR
from tests.architectures import LABELS

EXAMPLES = [*FOUR, Example("b d", "green")]
EARLIER = (TaskPrompt(("a", "b c"), "Text with one of"), TaskPrompt((), "Answer the text"))


@pytest.fixture
def model(causal_folder, small_adapter, random_adapter):
    return loaded(causal_folder, small_adapter, random_adapter)


def loaded(folder, adapter, random_adapter):
    """A decoder that holds adapters of rank 4, what is retained of 6, and their state."""
    config = ModelConfig(family="causal-lm", name=str(folder), max_new_tokens=4)
    model = load_model(config, adapter, 32)
    shapes = read(model.module).shapes
    learnt = compress(random_adapter(shapes, 4, 2.0, 5), 6)
    state = State(random_adapter(shapes, 4, 2.0, 7), learnt)
    load_state(model, state)
    return model, state


LETTERS = ("a", "b", "c", "d", "a b", "b c", "c d", "d a", "a c", "b d", "c c a", "d d b")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_record_adds_the_same_to_the_bit_whoever_else_is_there(
    make_causal, random_adapter, tmp_path, kind
):
    """What all prompts begin with is kept below the adapted layers, and so might be what the
    teacher says: neither may hold the rounding of a pass with one of the records in it."""
    folder = make_causal(tmp_path, kind)
    adapter = AdapterConfig(rank=4, retained_rank=6, lora_alpha=8.0, first_layer=1)
    examples = [Example(text, LABELS[n % 3]) for n, text in enumerate(LETTERS)]

    def added(places):
        model, state = loaded(folder, adapter, random_adapter)
        set_trainable(model.module, frozenset({"lora_B"}))
        data = model.encode([examples[place] for place in places], LABELS)
        task = LocalTask(model, state, data, LABELS, (), prompts=EARLIER, protected=True)
        objective = words_distilled(model, task, DistillationConfig())
        places = list(range(len(data)))
        return dpsgd.clipped_gradients(model.module, objective, places, places, 0.9, 2.0**-40).total

    whole = added(list(range(12)))
    for left_out in (0, 5, 11):
        rest, alone = added([n for n in range(12) if n != left_out]), added([left_out])
        for key, total in whole.items():
            assert torch.equal(total - rest[key], alone[key])


def test_where_records_are_protected_no_length_decides_what_the_teacher_keeps(model, monkeypatch):
    """What fits into memory depends on how long the answers of all are."""
    loaded, _ = model
    data = loaded.encode(EXAMPLES, LABELS)
    asked = []
    states = type(loaded).word_states

    def counted(self, batch, labels):
        asked.append(len(batch))
        return states(self, batch, labels)

    monkeypatch.setattr(type(loaded), "word_states", counted)
    teacher = word_teacher(loaded, data, LABELS, alone=True)
    assert asked == []
    teacher.states([2])
    teacher.states([2])
    assert asked == [1, 1]
    word_teacher(loaded, data, LABELS)
    assert sum(asked) == 2 + len(data)


def test_who_else_is_there_does_not_decide_under_which_prompt_a_text_is_asked_about(model):
    """Else a record, added or removed, would change the losses of others."""
    model, state = model
    data = model.encode(EXAMPLES, LABELS)
    config = DistillationConfig()
    task = LocalTask(model, state, data, LABELS, (), prompts=EARLIER)
    whole = words_distilled(model, task, config)
    with torch.no_grad():
        losses = whole.example_losses(range(len(data)))
        for n in range(len(data)):
            fewer = [*data[:n], *data[n + 1 :]]
            rest = words_distilled(model, replace(task, data=fewer, cache=Cache()), config)
            torch.testing.assert_close(
                rest.example_losses(range(len(fewer))),
                torch.cat([losses[:n], losses[n + 1 :]]),
                rtol=1e-5,
                atol=1e-6,
            )
    assert {which(item, 2) for item in data} == {0, 1}


def test_each_is_asked_under_one_prompt_and_the_teacher_answers_for_itself(model, causal_folder):
    model, _ = model
    data = model.encode(EXAMPLES, LABELS)
    asked, _ = ask(model, data, EARLIER)
    tokenizer = AutoTokenizer.from_pretrained(causal_folder)
    for n, item in enumerate(asked):
        prompt = EARLIER[which(data[n], 2)]
        alone = model.encode([Example(EXAMPLES[n].text, label) for label in prompt.labels[:1]]
                             or [Example(EXAMPLES[n].text, "", target="a")],
                             prompt.labels, prompt.instruction)[0]  # fmt: skip
        assert item.tokens == alone.tokens
        assert item.target == -1
        with at_task_start(model.module):
            if prompt.labels:
                best = prompt.labels[int(model.scores([alone], prompt.labels).argmax())]
                assert tokenizer.decode(item.answer).split() == best.split()
            else:
                assert (
                    tokenizer.decode(item.answer, skip_special_tokens=True).strip()
                    == (model.write([alone])[0])
                )
                assert 1 <= len(item.answer) <= 4


@pytest.mark.parametrize("words", [3, 64])
def test_the_loss_is_that_of_the_task_and_a_divergence_at_the_words_of_these_answers(
    model, monkeypatch, words
):
    monkeypatch.setattr("deal_core.models.generating.WORDS", words)
    model, state = model
    data = model.encode(EXAMPLES, LABELS)
    config = DistillationConfig(weight=0.7)
    task = LocalTask(model, state, data, LABELS, (EARLIER[0].labels,), prompts=EARLIER[:1])
    objective = words_distilled(model, task, config)
    with torch.no_grad():
        found = objective.example_losses(range(len(data)))
        plain = Plain(model, LABELS, data).example_losses(range(len(data)))
    asked, _ = ask(model, data, EARLIER[:1])
    for n, item in enumerate(asked):
        with torch.no_grad():
            student = model.word_logits(model.word_states([item], ())[0])
            with at_task_start(model.module):
                teacher = model.word_logits(model.word_states([item], ())[0])
        expected = kl_div(
            log_softmax(student / 2, 1), log_softmax(teacher / 2, 1), reduction="none",
            log_target=True,
        ).sum(1).mean() * 4  # fmt: skip
        assert expected > 1e-4
        torch.testing.assert_close(found[n], plain[n] + 0.7 * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("floats", [0, 2**25])
def test_a_teacher_whose_states_do_not_fit_is_asked_again(model, monkeypatch, floats):
    monkeypatch.setattr("deal_core.deal.distillation.CACHED_FLOATS", floats)
    model, _ = model
    asked, teacher = ask(model, model.encode(EXAMPLES, LABELS), EARLIER)
    for n, item in enumerate(asked):
        with torch.no_grad(), at_task_start(model.module):
            expected = model.word_logits(model.word_states([item], ())[0])
        found = teacher.logits(teacher.states([n])[0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_protected_records_are_asked_about_one_by_one(model, monkeypatch):
    model, state = model
    sizes = []
    real = type(model).answered

    def answered(self, batch, *rest):
        sizes.append(len(batch))
        return real(self, batch, *rest)

    monkeypatch.setattr(type(model), "answered", answered)
    data = model.encode(EXAMPLES, LABELS)
    task = LocalTask(model, state, data, LABELS, (), prompts=EARLIER, protected=True)
    words_distilled(model, task, DistillationConfig())
    assert sizes == [1] * len(data)


def test_lwf_distils_the_words_of_the_tasks_own_answers(model, small_adapter):
    """(M18): with the prompt and the answer of the task at hand."""
    model, state = model
    data = model.encode(EXAMPLES, LABELS)
    task = LocalTask(model, state, data, LABELS, (EARLIER[0].labels,), prompts=EARLIER[:1])
    method = make_method(MethodConfig(name="lwf"), small_adapter)
    objective = method.objective(task)
    with torch.no_grad():
        found = objective.example_losses(range(len(data)))
        for n, item in enumerate(data):
            student = model.word_logits(model.word_states([item], LABELS)[0])
            with at_task_start(model.module):
                teacher = model.word_logits(model.word_states([item], LABELS)[0])
            p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
            expected = 4 * (p * (p / q).log()).sum(1).mean()
            assert expected > 1e-4
            plain = Plain(model, LABELS, data).example_losses([n])[0]
            torch.testing.assert_close(found[n], plain + expected, rtol=1e-4, atol=1e-5)
    first = method.objective(LocalTask(model, state, data, LABELS, ()))
    assert isinstance(first, Plain)
