"""Which rows of a task are for testing, and which records a run's clients have: where records are
protected each by itself."""

import csv
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.data import Example, load_for_clients, open_source
from deal_core.data.files import FilesSource
from deal_core.data.source import each_by_itself, split_off, split_off_each
from deal_core.errors import UserError

EXAMPLES = tuple(
    Example(f"text {number}", label)
    for label, count in (("a", 100), ("b", 50), ("c", 7), ("d", 2), ("e", 1))
    for number in range(count)
)


def test_every_label_has_its_share_and_keeps_one_for_training():
    train, test = split_off(EXAMPLES, 0.2)
    assert len(train) + len(test) == len(EXAMPLES)
    assert set(train).isdisjoint(test)
    assert Counter(e.label for e in test) == {"a": 20, "b": 10, "c": 1, "d": 1}
    assert Counter(e.label for e in train) == {"a": 80, "b": 40, "c": 6, "d": 1, "e": 1}


TEXTS, ANSWERS = st.sampled_from("pqrstuvw"), st.sampled_from("abc")
LABELLED = st.lists(st.builds(Example, TEXTS, ANSWERS))
WRITTEN = st.lists(st.builds(Example, TEXTS, st.just(""), target=ANSWERS))


@pytest.mark.parametrize("split", [split_off, split_off_each])
@given(rows=LABELLED | WRITTEN, order=st.randoms(), share=st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_rows_alike_in_text_and_answer_are_on_one_side(split, rows, order, share):
    train, test = split(rows, share)
    assert Counter((*train, *test)) == Counter(rows)
    assert set(train).isdisjoint(test)
    order.shuffle(rows)
    assert [Counter(side) for side in split(rows, share)] == [Counter(train), Counter(test)]


@given(rows=LABELLED, share=st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_where_records_are_protected_a_text_is_on_one_side_whatever_its_labels(rows, share):
    train, test = split_off_each(rows, share)
    assert {e.text for e in train}.isdisjoint(e.text for e in test)


def test_a_label_has_its_share_whatever_other_labels_its_texts_have():
    """So a text may be on both sides, with another label on each."""
    rows = [Example(f"text {n}", "ab"[n < 10]) for n in range(100)]
    rows += [Example(f"text {n}", "c") for n in range(50)]
    train, test = split_off(rows, 0.2)
    assert Counter(e.label for e in test) == {"a": 18, "b": 2, "c": 10}
    assert not {e.text for e in train}.isdisjoint(e.text for e in test)


@given(st.integers(0, len(EXAMPLES) - 1))
def test_where_records_are_protected_none_moves_another(gone):
    """The split of a neighbouring data set is the same split without the record."""
    without = EXAMPLES[:gone] + EXAMPLES[gone + 1 :]
    for before, after in zip(
        split_off_each(EXAMPLES, 0.2), split_off_each(without, 0.2), strict=True
    ):
        assert set(before) - {EXAMPLES[gone]} == set(after)


def write(folder):
    (folder / "ward").mkdir()
    with (folder / "ward" / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows((e.text, e.label) for e in EXAMPLES)


def test_a_task_without_a_test_file_is_split(tmp_path):
    write(tmp_path)
    data = DataConfig(source="files", path=str(tmp_path))
    with pytest.raises(UserError, match=r"no file for the split 'test'.* set data.split = 0.2"):
        open_source(data).load("ward")
    split = data.model_copy(update={"split": 0.2})
    task = open_source(split).load("ward")
    assert (task.train, task.test) == split_off(EXAMPLES, 0.2)
    assert task.held_out
    (tmp_path / "ward" / "test.csv").write_text("text,label\nx,a\n")
    assert FilesSource(split).load("ward").test == (Example("x", "a"),)


@pytest.mark.parametrize("limits", [{}, {"max_test": 5}, {"max_train": 20, "max_test": 5}])
def test_private_clients_split_each_record_by_itself(tmp_path, limits):
    write(tmp_path)
    experiment = Experiment(
        data=DataConfig(source="files", path=str(tmp_path), split=0.3, **limits),
        privacy=PrivacyConfig(mechanism="record"),
    )
    train, test = split_off_each(EXAMPLES, 0.3)
    task = load_for_clients(experiment, "ward")
    assert task.labels == ("a", "b", "c", "d", "e")
    assert set(task.train) <= set(train)
    assert set(task.test) <= set(test)
    if not limits:
        assert (set(task.train), set(task.test)) == (set(train), set(test))
    else:
        assert len(task.test) == 5


MANY = [Example(f"text {n}", f"label {n % 3}") for n in range(2000)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_whether_a_record_is_taken_depends_on_it_alone(share):
    kept = each_by_itself(MANY, "task", share)
    assert abs(len(kept) / len(MANY) - share) < 0.05
    for left_out in range(0, 2000, 397):
        others = MANY[:left_out] + MANY[left_out + 1 :]
        expected = [example for example in kept if example != MANY[left_out]]
        assert list(each_by_itself(others, "task", share)) == expected


def test_under_a_mechanism_for_records_limits_take_about_so_many(make_experiment):
    given = ("data.max_train=0", "data.max_test=20", "data.max_train=100")
    plain = load_for_clients(make_experiment(*given), "surgery")
    private = load_for_clients(make_experiment(*given, "privacy.mechanism=record"), "surgery")
    whole = load_for_clients(make_experiment(*given[:2]), "surgery")
    assert len(plain.train) == pytest.approx(len(private.train), rel=0.3)
    assert len(plain.train) < len(whole.train)
    assert set(private.train) < set(whole.train)
    assert private.test == plain.test
