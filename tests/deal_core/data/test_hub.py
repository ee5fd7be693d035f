import gc
import json
import socket
from email.message import Message
from urllib.error import HTTPError

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from deal_core.config.data import DataConfig, HubTask, PartitionConfig
from deal_core.data import Example, open_source
from deal_core.data import hub as libraries
from deal_core.data.hub import load_split
from deal_core.data.rows import Columns
from deal_core.errors import UserError
from deal_core.models.loading import pinned, pretrained, with_revision

ROWS = [
    {"q": "book a flight", "more": "to Rome", "intent": 0, "site": "north"},
    {"q": "pay a bill", "more": "today", "intent": 1, "site": "south"},
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_class_labels(folder, test_label, names):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"q": Value("string"), "intent": ClassLabel(names=list(names))})
    for split, label in (("train", 0), ("test", test_label)):
        (folder / f"{split}.jsonl").unlink()
        rows = Dataset.from_dict({"q": ["book a flight"], "intent": [label]}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")


def config(folder, spec=None, **keys):
    default = {"path": str(folder), "text_column": "q", "label_column": "intent"}
    task = HubTask(**{**default, **(spec or {})})
    return DataConfig(source="hub", hub={"intents": task}, **keys)


def load(data, task="intents"):
    return open_source(data).load(task)


def error_of(data, task="intents"):
    with pytest.raises(UserError) as caught:
        load(data, task)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_label_text_names_the_labels_in_its_order(hub):
    spec = {"label_text": {"1": "money", "0": "travel"}, "pair_column": "more"}
    task = load(config(hub, spec))
    assert task.labels == ("money", "travel")
    assert task.train[1] == Example("pay a bill\ntoday", "money")
    assert task.test == (Example("book a flight\nto Rome", "travel"),)
    assert load(config(hub)).labels == ("0", "1")


def test_class_labels_give_their_names_and_the_whole_label_space(hub):
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
def test_bad_configuration_is_one_line(hub, spec, problem):
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


def test_chats_are_read_as_they_are_and_rows_without_an_answer_are_counted(hub):
    said = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a cat"}]
    for split in ("train", "test"):
        write(
            hub / f"{split}.jsonl",
            [{"messages": said}, {"messages": [*said[:1], {**said[1], "content": " "}]}],
        )
    data = load(config(hub, {"text_column": ""}, generation=["intents"]))
    assert (data.train, data.left_out) == ((Example("What is it?", "", target="a cat"),), 2)


@pytest.fixture
def files_left_open():
    """By the library, until memory is collected: here, and not in a test that comes later."""
    yield
    gc.collect()


def csv_test(test):
    """Mark a test that has CSV files read."""
    quiet = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return quiet(pytest.mark.usefixtures("files_left_open")(test))


def csv_folder(folder, header, *rows):
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").unlink()
        (folder / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return DataConfig(source="hub", hub={"ward": HubTask(path=str(folder))})


@csv_test
def test_csv_files_are_read_as_they_are_written(hub):
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
def test_what_is_wrong_with_files_is_said(hub, name, content, told):
    config = csv_folder(hub, "text,label", "fever,x", "cough,y")
    (hub / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        open_source(config).load("ward")


@pytest.fixture
def silent():
    """Takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def use(monkeypatch, address):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    libraries._answers.cache_clear()  # an earlier test may have had the same port


def test_a_hub_that_keeps_silent_costs_seconds_once(silent, monkeypatch):
    use(monkeypatch, silent)
    monkeypatch.setattr(libraries, "SECONDS", 0.5)
    before = libraries._answers.cache_info().misses
    with pytest.raises(UserError) as model:
        pretrained(AutoConfig, "nobody/nothing")
    with pytest.raises(UserError) as data:
        load_split("ward", HubTask(path="nobody/nothing"), "train", Columns("text", "label"))
    assert libraries._answers.cache_info().misses == before + 1
    assert str(model.value).startswith("model.name 'nobody/nothing': cannot load this name (")
    assert "data.hub.ward (nobody/nothing, split train): cannot be loaded (" in str(data.value)
    assert "\n" not in f"{model.value}{data.value}"


def test_any_answer_is_one(monkeypatch):
    def refused(request, timeout):
        raise HTTPError(request.full_url, 404, "no such page", Message(), None)

    use(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setattr(libraries, "urlopen", refused)
    libraries.reach_hub()
    assert not constants.HF_HUB_OFFLINE


def keep_in_cache(folder, monkeypatch):
    """A model of the hub in two revisions; the name means the first."""
    snapshot = folder / "models--somebody--something"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("1")
    for revision, kind in (("1", "bert"), ("2", "roberta")):
        (snapshot / "snapshots" / revision).mkdir(parents=True)
        text = json.dumps({"model_type": kind})
        (snapshot / "snapshots" / revision / "config.json").write_text(text)
    for name in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "huggingface_hub.file_download.HF_HUB_CACHE",
    ):
        monkeypatch.setattr(name, str(folder), raising=False)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(folder), raising=False)


def test_a_revision_is_the_one_that_is_named(silent, tmp_path, monkeypatch):
    use(monkeypatch, silent)
    monkeypatch.setattr(libraries, "SECONDS", 0.2)
    keep_in_cache(tmp_path, monkeypatch)
    kinds = [
        pretrained(AutoConfig, f"somebody/something{named}", cache_dir=str(tmp_path)).model_type
        for named in ("", "@1", "@2")
    ]
    assert kinds == ["bert", "bert", "roberta"]
    with pytest.raises(UserError, match="'somebody/something@3': cannot load this name"):
        pretrained(AutoConfig, "somebody/something@3", cache_dir=str(tmp_path))


def test_the_commit_that_was_read_is_named(tmp_path, monkeypatch):
    """So that what was learnt is answered with the model that it was learnt for, wherever the name
    may point by then."""
    keep_in_cache(tmp_path, monkeypatch)
    (folder,) = tmp_path.iterdir()
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "snapshots" / "1").rename(folder / "snapshots" / commit)
    (folder / "refs" / "main").write_text(commit)
    assert pinned("somebody/something") == f"somebody/something@{commit}"
    assert pinned("somebody/something@2") == "somebody/something@2"
    assert pinned("somebody/else") == "somebody/else"
    assert [pinned(name) for name in ("embedded:minilm", str(folder))] == [
        "embedded:minilm",
        str(folder),
    ]
    (tmp_path / "model@2").mkdir()
    at = str(tmp_path / "model@2")
    assert with_revision(at) == (at, "")  # a folder is its whole name
