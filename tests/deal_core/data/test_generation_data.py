"""Tasks whose answer is a text."""

import json

import pytest

from deal_core.config.data import DataConfig
from deal_core.data import open_source
from deal_core.data.source import Example
from deal_core.errors import UserError
from deal_core.training.text_overlap import exact_match, rouge_1, rouge_l

ROWS = [
    {"text": "What is it?", "target": "a cat", "refs": ["a cat", "the cat"]},
    {"text": "And that?", "target": "a dog", "refs": "one dog"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "animals").mkdir()
    for split in ("train", "test"):
        lines = "\n".join(json.dumps(row) for row in ROWS)
        (tmp_path / "animals" / f"{split}.jsonl").write_text(lines)
    return tmp_path


def config(folder, **more):
    return DataConfig.model_validate(
        {"source": "files", "path": str(folder), "generation": ["animals"], **more}
    )


def test_answers_and_further_right_ones_are_read(folder):
    task = open_source(config(folder, files={"animals": {"references_column": "refs"}})).load(
        "animals"
    )
    assert task.labels == ()
    assert task.train == (
        Example("What is it?", "", target="a cat", references=("a cat", "the cat")),
        Example("And that?", "", target="a dog", references=("one dog",)),
    )
    alone = open_source(config(folder)).load("animals")
    assert [example.references for example in alone.test] == [(), ()]


def test_a_site_leaves_such_a_row_out(folder):
    text = json.dumps(ROWS[0]) + "\n" + json.dumps({"text": "a"})
    (folder / "animals" / "train.jsonl").write_text(text)
    site = config(folder, source="site", labels={"animals": []})
    task = open_source(site).load("animals")
    assert [example.target for example in task.train] == ["a cat"]
    assert task.left_out == 1


EMBEDDED = {
    "medicines": 475,
    "passage-answer": 1136,
    "specialty": 7782,
    "research-question": 1000,
    "passage-question": 1034,
    "times": 1453,
    "sex": 1334,
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_that_write(name):
    source = open_source(DataConfig(source="embedded", generation=tuple(EMBEDDED)))
    task, examples = source.load(name), EMBEDDED[name]
    assert (len(task.train), len(task.test)) == (examples - examples // 5, examples // 5)
    assert task.labels == ()
    assert all(each.target for each in task.train)
    assert not {e.text for e in task.train} & {e.text for e in task.test}
    for each in (*task.train, *task.test):
        if name == "medicines":
            assert all(word in each.text for word in each.target.split(", "))
        if name == "passage-answer":
            sentence, question = each.text.split("\nQuestion: ")
            assert question
            assert each.target.lower() in sentence.lower()
        if name == "passage-question":
            sentence, answer = each.text.split("\nAnswer: ")
            assert answer.lower() in sentence.lower()
        if name == "times":
            assert all(part in each.text for part in each.target.split(", "))
        if name == "sex":
            assert each.target in ("male", "female")


def test_an_embedded_task_that_writes_is_declared():
    assert len(open_source(DataConfig(source="embedded")).task_names()) == 12
    with pytest.raises(UserError, match="its answers are texts; add it to"):
        open_source(DataConfig(source="embedded")).load("research-question")


@pytest.mark.parametrize(
    ("written", "right", "expected"),
    [
        ("the cat sat on the mat", ["the cat was on the mat"], 10 / 12),
        ("mat the", ["the mat"], 0.5),
        ("...", ["?"], 1.0),
        ("a dog", ["a cat", "one dog", "a dog"], 1.0),
    ],
)
def test_rouge_l(written, right, expected):
    """Of two sequences of words, by hand: twice the common subsequence over both lengths."""
    assert rouge_l(written, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("written", "right", "expected"),
    [
        ("the cat sat on the mat", ["the cat was on the mat"], 10 / 12),
        ("the the the", ["The cat."], 2 / 5),
        ("...", ["?"], 1.0),
        ("a dog", ["one cat", "one dog", "a"], 2 / 3),
        ("größe", ["GRÖSSE", "Größe"], 1.0),
    ],
)
def test_rouge_1(written, right, expected):
    """Of two bags of words, by hand: twice what they share over both sizes."""
    assert rouge_1(written, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("written", "right", "expected"),
    [
        ("The cat!", ["a dog", "the  cat"], True),
        ("cat the", ["the cat"], False),
        ("", ["the cat"], False),
        ("größe", ["gr e"], False),
    ],
)
def test_exact_match(written, right, expected):
    assert exact_match(written, right) is expected
