"""Scores of names and of heads, and written texts: counted as by hand; and, where each is computed
with alone, a text that fails changes nothing about the others."""

import logging

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.deal.distillation import make_teacher
from deal_core.models import embedding_size, load_model
from deal_core.models.interface import Encoded
from deal_core.training.evaluation import (
    NO_ANSWER,
    answer_space,
    base_embeddings,
    by_heads,
    by_names_told,
    count_both,
    embeddings_alone,
)
from deal_core.training.loop import contained
from deal_core.training.text_overlap import exact_match, rouge_1, rouge_l, words

NAMES = ("heart", "skin")
SENTENCES = ("a beat", "a rash that itches", "a valve")
LEARNT = {"heart": ("old", "new"), "skin": ("rash", "old")}


def examples(*targets):
    """Each has one token: its place."""
    return [Encoded((place,), target) for place, target in enumerate(targets)]


def scorer(rows):
    """A row for each example."""
    return lambda batch: torch.tensor([rows[i] for i in batch])


def test_a_task_that_is_not_learnt_yet_adds_its_own_labels():
    space = answer_space("eye", ("red", "blind"), LEARNT)
    assert space.columns[-2:] == (("eye", "red"), ("eye", "blind"))
    assert space.own == (4, 5)
    assert answer_space("skin", LEARNT["skin"], LEARNT).own == (2, 3)
    assert answer_space("eye", ("red", "blind"), {}).own == (0, 1)


def test_right_among_its_own_labels_may_be_wrong_among_all():
    space = answer_space("skin", LEARNT["skin"], LEARNT)
    rows = [
        [0.0, 0.0, 0.9, 0.1],  # right in both
        [0.0, 1.0, 0.9, 0.1],  # another task's label is better
        [0.0, 0.0, 0.9, 0.1],  # wrong in both
    ]
    assert count_both(scorer(rows), examples(0, 0, 1), space) == (2, 1)


def test_of_equal_scores_the_first_column_wins():
    space = answer_space("skin", LEARNT["skin"], LEARNT)
    assert count_both(scorer([[0.1, 0.5, 0.1, 0.5]]), examples(1), space) == (1, 0)
    own = answer_space("heart", LEARNT["heart"], LEARNT)
    assert count_both(scorer([[0.5, 0.1, 0.1, 0.5]]), examples(0), own) == (1, 1)


def test_labels_of_equal_name_in_two_tasks_are_one_class():
    own = answer_space("heart", LEARNT["heart"], LEARNT)
    rows = [[0.2, 0.1, 0.1, 0.5], [0.2, 0.1, 0.5, 0.1]]  # the other task's "old", and its "rash"
    assert count_both(scorer(rows), examples(0, 0), own) == (2, 1)


def test_scores_that_are_no_numbers_are_no_answer():
    """Else a model that gives none would be right wherever the first label is."""
    nan = float("nan")
    space = answer_space("heart", LEARNT["heart"], {})
    assert count_both(scorer([[nan, nan], [nan, nan]]), examples(0, 1), space) == (0, 0)
    assert count_both(scorer([[nan, 0.3], [0.3, nan]]), examples(1, 1), space) == (1, 1)


SPACE = answer_space("skin", LEARNT["skin"], LEARNT)
TEXTS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
SKIN = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.5]])


def names(batch):
    return torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])[list(batch)]


def test_heads_and_names_add_up_and_either_can_be_the_reason():
    """A head that knows nothing of a task never gives its labels, whatever the names say."""
    heads = {"skin": SKIN}
    for scores in (by_heads(TEXTS, SPACE, heads), by_heads(TEXTS, SPACE, heads, names, 0.1)):
        assert count_both(scores, examples(0, 1), SPACE) == (2, 2)
    scores = by_heads(TEXTS, SPACE, heads, names, 1.0)
    assert count_both(scores, examples(0, 0), SPACE) == (2, 2)
    found = by_heads(TEXTS, SPACE, heads, names, 0.5)([1])[0]
    torch.testing.assert_close(found[2:], torch.tensor([1.0, 0.75]).double())
    assert float(found[:2].max()) <= NO_ANSWER


def test_a_task_without_a_head_is_answered_by_names_where_it_is_told_and_never_where_it_is_not():
    """Whoever does not know the task asks the heads, and these know other tasks alone."""
    heart = answer_space("heart", LEARNT["heart"], LEARNT)
    heads = by_heads(TEXTS, heart, {"skin": SKIN}, names, 0.5)
    told = by_names_told(lambda batch: names(batch) + torch.tensor([0, 1e-3, 0, 0]), heads, heart)
    assert count_both(told, examples(1, 1), heart) == (2, 0)
    torch.testing.assert_close(told([0, 1])[:, 2:], heads([0, 1])[:, 2:])
    more = {**LEARNT, "lung": ("dry",)}  # and another without one
    three = answer_space("heart", LEARNT["heart"], more)
    near = torch.tensor([[0.5, 0.50003, 0.0, 0.0, 0.0]])
    told = by_names_told(lambda batch: near, by_heads(TEXTS, three, {"skin": SKIN}), three)
    assert count_both(told, examples(1), three) == (1, 0)
    shared = answer_space("heart", LEARNT["heart"], LEARNT)
    told = by_names_told(
        lambda batch: -names(batch), by_heads(TEXTS, shared, {"skin": SKIN}), shared
    )
    assert count_both(told, examples(1, 0), shared) == (1, 1)  # 'old' of heart, by the head of skin


def test_a_failure_about_one_record_stands_in_the_sites_log_alone(caplog):
    def fail():
        raise IndexError("a text of 9 tokens")

    with caplog.at_level(logging.ERROR):
        assert contained(fail, alone=True) is None
    assert [r.exc_info is not None for r in caplog.records] == [True]
    with pytest.raises(IndexError, match="9 tokens"):
        contained(fail, alone=False)


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(), AdapterConfig(rank=2), 16)


@pytest.fixture(scope="module")
def data(model):
    return model.encode([Example(text, NAMES[n % 2]) for n, text in enumerate(SENTENCES)], NAMES)


def failing_on(monkeypatch, model, name, tokens):
    """One method of the model fails where one text is among those it is asked about."""
    real = getattr(model, name)

    def asked(batch, *others):
        if any(item.tokens == tokens for item in batch):
            raise IndexError("too long")
        return real(batch, *others)

    monkeypatch.setattr(model, name, asked)


def test_an_embedding_that_fails_is_no_number(model, data, monkeypatch):
    size = embedding_size(ModelConfig(), 2)
    whole = embeddings_alone(model, data, 2, size)
    torch.testing.assert_close(whole, base_embeddings(model, data, 2), rtol=0, atol=1e-5)
    failing_on(monkeypatch, model, "embed", data[1].tokens)
    found = embeddings_alone(model, data, 2, size)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    assert embeddings_alone(model, data[1:2], 2, size).isnan().all()
    with pytest.raises(IndexError):
        base_embeddings(model, data, 2)


def test_a_teacher_that_fails_on_one_answers_about_the_others(model, data, monkeypatch):
    whole = make_teacher(model, data, NAMES, [NAMES], alone=True)
    failing_on(monkeypatch, model, "forward_train", data[1].tokens)
    found = make_teacher(model, data, NAMES, [NAMES], alone=True)
    for place in (0, 2):
        assert torch.equal(found([place])[0], whole([place])[0])
    with pytest.raises(KeyError):
        found([1])
    with pytest.raises(IndexError):
        make_teacher(model, data, NAMES, [NAMES])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world_1: x2!", ["hello", "world_1", "x2"]),
        ("Größe: 3 µm", ["größe", "3", "µm"]),
        ("यह की", ["यह", "की"]),  # vowel signs belong to their word
        ("cafe\u0301 caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("北京 X1です", ["北", "京", "x1", "で", "す"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("서울은 수도", ["서울은", "수도"]),
        ("…", []),
        ("I am happy ☺\ufe0f, yes ✔\ufe0f", ["i", "am", "happy", "yes"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_marks_make_words_differ():
    assert not exact_match("यह की", ["यह का"])
    assert exact_match("Cafe\u0301!", ["caf\u00e9"])


def test_texts_without_spaces_overlap_by_letters():
    assert rouge_l("北京是首都", ["北京是中国的首都"]) == pytest.approx(2 * 5 / (5 + 8))
    assert rouge_1("都首", ["首都"]) == 1.0 > rouge_l("都首", ["首都"])
