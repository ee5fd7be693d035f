"""The family whose words have tags, on real models: its losses, what is distilled, its words; and
that gradients of records stay apart."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, normalize

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.data.tags import OUTSIDE, tags_of
from deal_core.deal.distillation import TEMPERATURE, Distilled, make_teacher
from deal_core.deal.objective import Plain
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import example_gradient, read, set_trainable, write
from deal_core.lora.state import State
from deal_core.models import load_model
from deal_core.models.tokens import NAMES, TokenLabels
from deal_core.privacy.record_gradients import record_gradients, widths_apart
from deal_core.training.loop import load_state
from tests.architectures import save
from tests.sizes import ENCODER

LABELS = ("patient", "record_number")
EXAMPLES = [
    Example(
        "Ann Belgarde has MR-482913 .",
        "",
        tags=("B-patient", "I-patient", "O", "B-record_number", "O"),
    ),
    Example("No name", "", tags=("O", "O")),
    Example("Seen : Tom", "", tags=("O", "O", "B-patient")),
]


def loaded(name, length=64):
    model = load_model(ModelConfig(family="token-labels", name=name), AdapterConfig(), length)
    assert isinstance(model, TokenLabels)
    return model


@pytest.fixture(scope="module")
def tagger():
    return loaded(ModelConfig().name)


@pytest.fixture
def moved(random_adapter):
    """A small one, with something in both factors, which learn."""
    model = loaded(str(ENCODER))
    write(model.module, random_adapter(read(model.module).shapes, 8, 0.05, seed=5))
    set_trainable(model.module, frozenset({"lora_A", "lora_B"}))
    return model


def scores(model, example, labels):
    """Of each word alone, by the tokens that the tokeniser makes of each of the words."""
    parts = [
        model._tokenizer(w, add_special_tokens=False)["input_ids"] for w in example.text.split()
    ]
    start, end = model._tokenizer("")["input_ids"]
    ids = [start, *(token for part in parts for token in part), end]
    with torch.no_grad():
        states = model.module(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
        ).last_hidden_state[0]
    firsts = [1 + sum(map(len, parts[:n])) for n in range(len(parts))]
    names = [NAMES[tag[0]].format(tag[2:]) for tag in tags_of(labels)]
    return 20 * normalize(states[firsts], dim=1) @ model.label_vectors(names).T


def test_a_loss_is_the_mean_over_the_words_of_a_text(tagger):
    batch = tagger.encode(EXAMPLES, LABELS)
    with torch.no_grad():
        learnt = tagger.forward_train(batch, LABELS, [("medicine",), ("date", "time")])
    tags, expected = tags_of(LABELS), []
    for example in EXAMPLES:
        own = scores(tagger, example, LABELS)
        expected.append(cross_entropy(own, torch.tensor([tags.index(t) for t in example.tags])))
    torch.testing.assert_close(learnt.example_losses, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert (learnt.spaces, learnt.rows) == ([3, 5], [5, 2, 3])
    other = torch.cat([scores(tagger, example, ("date", "time")) for example in EXAMPLES])
    torch.testing.assert_close(learnt.distillation_logits[:, 3:], other, atol=1e-3, rtol=1e-3)


def test_the_likeliest_tag_of_every_word(tagger):
    found = tagger.tagged(tagger.encode(EXAMPLES, LABELS), LABELS)
    for example, tags in zip(EXAMPLES, found, strict=True):
        best = scores(tagger, example, LABELS).argmax(1).tolist()
        assert tags == [tags_of(LABELS)[place] for place in best]


def test_words_beyond_the_longest_text_are_in_no_entity_and_no_loss():
    short = loaded(str(ENCODER), 8)
    long = Example("abc def ghi jkl", "", tags=("O", "B-patient", "B-patient", "B-patient"))
    (item,) = short.encode([long], LABELS)
    assert item.right == long.tags
    assert len(item.tokens) == 8
    cut = Example("abc def", "", tags=long.tags[:2])
    both = [short.encode([each], LABELS) for each in (long, cut)]
    losses = [short.forward_train(each, LABELS, ()).example_losses for each in both]
    torch.testing.assert_close(*losses)
    assert short.tagged(both[0], LABELS)[0][2:] == [OUTSIDE, OUTSIDE]


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_the_first_token_of_a_word_is_found_in_its_text(name, tmp_path):
    """Whatever a tokeniser takes along with it."""
    from transformers import AutoTokenizer

    model = loaded(str(save(tmp_path, name)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids, firsts = model._tokenized("a b c")
    assert sorted(firsts) == [0, 1, 2]
    words = [tokenizer.decode([ids[place]]).strip() for place in firsts.values()]
    assert words == ["a", "b", "c"]


def test_words_are_distilled_over_the_tags_of_other_tasks(moved):
    data, spaces = moved.encode(EXAMPLES, LABELS), [("medicine",), ("time",)]
    teacher = make_teacher(moved, data, LABELS, spaces)
    objective = Distilled(moved, LABELS, spaces, [1.0, 0.5], data, teacher)
    losses = objective.example_losses([0, 1, 2])
    plain = Plain(moved, LABELS, data).example_losses([0, 1, 2])
    for n, item in enumerate(data):
        ours = moved.forward_train([item], LABELS, spaces).distillation_logits / TEMPERATURE
        theirs = torch.cat(teacher([n])) / TEMPERATURE
        kept = sum(
            weight
            * TEMPERATURE**2
            * kl_div(
                ours[:, a : a + 3].log_softmax(1),
                theirs[:, a : a + 3].log_softmax(1),
                log_target=True,
                reduction="none",
            )
            .sum(1)
            .mean()
            for a, weight in ((0, 1.0), (3, 0.5))
        )
        assert float(kept.detach()) > 0
        torch.testing.assert_close(losses[n], plain[n] + kept, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_a_record_is_its_own_to_the_bit(moved):
    """Whoever else is in a step, in whatever place; and where another's loss is no number."""
    texts = [*EXAMPLES, *(Example("ab " * n, "") for n in (4, 7, 12, 2, 15))]
    data = moved.encode(texts, LABELS)
    assert widths_apart(moved.module)
    objective = Plain(moved, LABELS, data)
    every = range(len(data))
    together = list(record_gradients(moved.module, objective, every))
    for some in ([0], [2, 0], [7, 1, 0, 5], list(reversed(every))):
        for place, gradient in zip(
            some, record_gradients(moved.module, objective, some), strict=True
        ):
            assert all(torch.equal(gradient[key], own) for key, own in together[place].items())
    for place in every:
        alone = example_gradient(moved.module, objective, place)
        for key, own in alone.items():
            torch.testing.assert_close(together[place][key], own, atol=1e-5, rtol=1e-3)
    moved.module.get_input_embeddings().weight.data[data[4].tokens[1]] = torch.inf
    spoilt = list(record_gradients(moved.module, objective, every))
    for place, item in enumerate(data):
        if data[4].tokens[1] not in item.tokens:
            assert all(torch.equal(spoilt[place][key], own) for key, own in together[place].items())


def test_a_model_that_is_put_back_answers_as_before(tagger, shapes):
    batch = tagger.encode(EXAMPLES, LABELS)
    before = tagger.tagged(batch, LABELS)
    load_state(tagger, State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)))
    assert tagger.tagged(batch, LABELS) == before
