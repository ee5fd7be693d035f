from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deal_core.config.data import DataConfig, HubTask, PartitionConfig
from deal_core.data import Example, TaskData, open_source
from deal_core.errors import UserError

ROWS = [
    {"q": "book a flight", "more": "to Rome", "intent": 0, "site": "north"},
    {"q": "pay a bill", "more": "today", "intent": 1, "site": "south"},
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that load_dataset reads as a data set; its cache lies beside it."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "intents"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        write(folder / f"{split}.jsonl", rows)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_class_labels(folder: Path, test_label: int, names: tuple[str, ...]) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"q": Value("string"), "intent": ClassLabel(names=list(names))})
    for split, label in (("train", 0), ("test", test_label)):
        (folder / f"{split}.jsonl").unlink()
        rows = Dataset.from_dict({"q": ["book a flight"], "intent": [label]}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")


def config(folder: Path, spec: dict[str, Any] | None = None, **keys: Any) -> DataConfig:
    default = {"path": str(folder), "text_column": "q", "label_column": "intent"}
    task = HubTask(**{**default, **(spec or {})})
    return DataConfig(source="hub", hub={"intents": task}, **keys)


def load(data: DataConfig, task: str = "intents") -> TaskData:
    return open_source(data).load(task)


def error_of(data: DataConfig, task: str = "intents") -> str:
    with pytest.raises(UserError) as caught:
        load(data, task)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_label_text_names_the_labels_in_its_order(hub: Path) -> None:
    spec = {"label_text": {"1": "money", "0": "travel"}, "pair_column": "more"}
    task = load(config(hub, spec))
    assert task.labels == ("money", "travel")
    assert task.train[1] == Example("pay a bill\ntoday", "money")
    assert task.test == (Example("book a flight\nto Rome", "travel"),)
    assert load(config(hub)).labels == ("0", "1")


def test_class_labels_give_their_names_and_the_whole_label_space(hub: Path) -> None:
    write_class_labels(hub, 1, ("travel ", "money"))
    data = config(hub, partition=PartitionConfig(kind="column", column="q"))
    task = load(data)
    assert task.labels == ("travel", "money")
    assert task.groups == ("book a flight",)
    assert [example.label for example in (*task.train, *task.test)] == ["travel", "money"]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"path": "no/such-folder"}, "(no/such-folder, split train): cannot be loaded"),
        ({"train_split": "training"}, "split training): cannot be loaded"),
        ({"text_column": "p"}, "no column 'p'; the columns are: q, more, intent, site"),
        ({"label_text": {"0": "travel"}}, "row 2: label '1' has no text (known: 0)"),
        ({"train_split": "train[:1]", "test_split": "train"}, "no training example has the label"),
        ({"test_split": "train[:0]"}, "corresponds to no data"),
    ],
)
def test_bad_configuration_is_one_line(hub: Path, spec: dict[str, Any], problem: str) -> None:
    message = error_of(config(hub, spec))
    assert message.startswith("data.hub.intents (")
    assert problem in message


ANSWERS = [
    {"q": "What is it?", "a": "a cat", "more": ["a cat", "the cat"]},
    {"q": "And that?", "a": "a dog", "more": ["one dog"]},
]


def test_a_task_whose_answers_are_texts_has_columns_of_its_own(hub):
    for split in ("train", "test"):
        write(hub / f"{split}.jsonl", ANSWERS)
    spec = {"target_column": "a", "references_column": "more"}
    data = load(config(hub, spec, generation=["intents"]))
    assert data.labels == ()
    assert data.train == data.test
    assert data.train[0] == Example(
        "What is it?", "", target="a cat", references=("a cat", "the cat")
    )


@pytest.fixture
def files_left_open() -> Iterator[None]:
    """By the library, until memory is collected: here, and not in a test that comes later."""
    yield
    gc.collect()


def csv_test(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that has CSV files read."""
    quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return quiet(pytest.mark.usefixtures("files_left_open")(test))


def csv_folder(folder: Path, header: str, *rows: str) -> DataConfig:
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").unlink()
        (folder / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return DataConfig(source="hub", hub={"ward": HubTask(path=str(folder))})


@csv_test
def test_csv_files_are_read_as_they_are_written(hub: Path) -> None:
    """No code becomes a number, no text a value that is missing, and no column a name of rows."""
    config = csv_folder(hub, "text,label", "NA,010", '"has fever, coughs",10', "007,0010")
    task = open_source(config).load("ward")
    assert [(e.text, e.label) for e in task.train] == [
        *(("NA", "010"), ("has fever, coughs", "10"), ("007", "0010"))
    ]
    assert task.labels == ("0010", "010", "10")


@csv_test
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        # Else the first half of every text would be the name of its row.
        ("train.csv", b"text,label\npatient 1, has fever,01\n", "Length of header"),
        ("README.md", b"---\na: [1\nb: }\n---\n", "data.hub.ward"),
        ("train.csv", b"text,label\ncaf\xe9,x\n", "utf-8"),
        ("train.csv", b"", "No columns to parse"),
    ],
    ids=["fields", "card", "latin-1", "empty"],
)
def test_what_is_wrong_with_files_is_said(hub: Path, name, content, told) -> None:
    config = csv_folder(hub, "text,label", "fever,x", "cough,y")
    (hub / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        open_source(config).load("ward")
