import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from deal_core.config.data import DataConfig, PartitionConfig, TaskColumns
from deal_core.config.experiment import Experiment, FederationConfig
from deal_core.data import Example, TaskData, client_names, open_source
from deal_core.data.files import FilesSource
from deal_core.errors import UserError

Rows = Sequence[Mapping[str, Any]]
TRAIN = (
    {"text": "chest pain, left arm", "label": 1, "ward": "A"},
    {"text": 'said "it itches",\nfor a week', "label": 2, "ward": "B"},
    {"text": "Übelkeit", "label": 1, "ward": "B"},
)
TEST = ({"text": "red skin", "label": 2, "ward": "A"},)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        columns = list(rows[0]) if rows else ["text", "label", "ward"]
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.string()), ("label", pa.int64()), ("ward", pa.string())])
    pq.write_table(pa.Table.from_pylist(list(rows), schema if not rows else None), path)


def write_excel(path, rows):
    import pandas

    frame = pandas.DataFrame(list(rows), columns=list(rows[0]) if rows else ["text", "label"])
    frame.to_excel(path, index=False)


WRITERS = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".tsv": partial(write_csv, delimiter="\t"),
    ".parquet": write_parquet,
    ".xlsx": write_excel,
}


def make_task(root, suffix=".jsonl", name="triage"):
    folder = root / name
    folder.mkdir()
    WRITERS[suffix](folder / f"train{suffix}", TRAIN)
    WRITERS[suffix](folder / f"test{suffix}", TEST)
    return folder


def load(root, task="triage", **keys):
    return open_source(DataConfig(**{"source": "files", "path": str(root), **keys})).load(task)


def error_of(root, task="triage", **keys):
    with pytest.raises(UserError) as caught:
        load(root, task, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_task(tmp_path, suffix):
    make_task(tmp_path, suffix)
    assert load(tmp_path) == TaskData(
        name="triage",
        labels=("1", "2"),
        train=(
            Example("chest pain, left arm", "1"),
            Example('said "it itches",\nfor a week', "2"),
            Example("Übelkeit", "1"),
        ),
        test=(Example("red skin", "2"),),
    )


def test_groups_are_those_of_all_tasks(tmp_path):
    make_task(tmp_path)
    other = make_task(tmp_path, name="other")
    write_jsonl(other / "train.jsonl", [{**row, "ward": "C"} for row in TRAIN])
    by_ward = PartitionConfig(kind="column", column="ward")
    task = load(tmp_path, partition=by_ward)
    assert [example.group for example in task.train] == ["A", "B", "B"]
    assert task.groups == ("A", "B", "C")
    assert load(tmp_path).groups == ()
    data = DataConfig(source="files", path=str(tmp_path), partition=by_ward)
    for clients, names in ((3, ["A", "B", "C"]), (2, [])):  # of two some have several
        federation = FederationConfig(clients=clients)
        assert client_names(Experiment(data=data, federation=federation)) == names
    missing = error_of(tmp_path, partition=PartitionConfig(kind="column", column="wart"))
    assert "no column 'wart'" in missing
    assert "did you mean 'ward'?" in missing
    assert "needs data.partition.column" in error_of(
        tmp_path, partition=PartitionConfig(kind="column")
    )


def test_byte_order_mark_and_blank_lines_are_no_data(tmp_path):
    folder = make_task(tmp_path, ".csv")
    (folder / "train.csv").write_text("\n text,label\n\nfever,2\n", encoding="utf-8-sig")
    (folder / "test.csv").unlink()
    (folder / "test.jsonl").write_text('\n{"text": "rash", "label": "2"}\n\n', encoding="utf-8-sig")
    task = load(tmp_path)
    assert (task.train, task.test) == ((Example("fever", "2"),), (Example("rash", "2"),))


GOOD_LINE = b'{"text": "x", "label": "y"}\n'


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("train.jsonl", GOOD_LINE + b'{"text": "x", \n', "row 2: not valid JSON"),
        ("train.jsonl", GOOD_LINE + b"[1]\n", "row 2: not a JSON object"),
        ("train.jsonl", b"[" * 100_000, "row 1: not valid JSON"),
        ("train.jsonl", GOOD_LINE + b'{"text": "\xe9"}', "row 2: not UTF-8"),
        ("train.jsonl", b'{"text": ["x"], "label": "y"}', "row 1: column 'text' holds a list"),
        ("train.csv", b"text,label\nx,y\nx,y,z\n", "row 3: 3 fields, but the header has 2"),
        ("train.csv", b'text,label\n"a\nb",y\nx,y,z\n', "row 4: 3 fields"),
        ("train.csv", b'text,label\n"a\nb,y\n', "row 2: not valid CSV"),
        ("train.csv", b"text,label\nx,y\n\xff,y\n", "row 3: not UTF-8"),
        (
            "train.csv",
            b"text;label\nx;y\nx;y;z\n",
            "row 3: 3 fields, but the header has 2; quote f",
        ),
        ("train.parquet", b"not parquet", "row 1: not a readable Parquet file"),
        ("train.csv", "text,label\nx,y\n".encode("utf-16"), "row 1: not UTF-8 text; save the file"),
    ],
)
def test_corrupt_files_name_file_and_row(tmp_path, file, content, problem):
    folder = make_task(tmp_path)
    (folder / "train.jsonl").unlink()
    (folder / file).write_bytes(content)
    assert error_of(tmp_path).startswith(f"{folder / file}, {problem}")


def test_a_task_may_have_columns_of_its_own(tmp_path):
    make_task(tmp_path)
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"text": "one", "second": "two", "class": "same"}])
    own = {"pairs": {"pair_column": "second", "label_column": "class"}}
    config = DataConfig.model_validate({"source": "files", "path": str(tmp_path), "files": own})
    source = open_source(config)
    assert source.load("pairs").train == (Example("one\ntwo", "same"),)
    assert source.load("triage") == load(tmp_path)  # the others keep the columns of the table


@pytest.mark.parametrize("name", ["..", "../outside", ".", "/etc"])
def test_the_name_of_a_task_leads_nowhere_and_tells_nothing(tmp_path, name):
    """A name that is a folder elsewhere gives the same as one that is none."""
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    make_task(root)
    assert load(root, name, labels={name: ("x",)}) == TaskData(name, ("x",), (), ())


@pytest.mark.parametrize(
    "content",
    [
        "text;label\nchest, left;1\nskin;2\n",
        '\n"text, in; words";label;text\n;1;chest, left\n;2;skin\n',
        "text;label\r\nchest, left;1\r\nskin;2\r\n",
    ],
)
def test_the_header_says_what_separates_the_fields(tmp_path, content):
    folder = make_task(tmp_path, ".csv")
    (folder / "train.csv").write_bytes(content.encode("utf-8-sig"))
    assert load(tmp_path).train == (Example("chest, left", "1"), Example("skin", "2"))


def test_all_problems_of_a_task_at_once(tmp_path):
    folder = make_task(tmp_path)
    write_jsonl(folder / "train.jsonl", [*TRAIN, {"text": [], "label": 1}, {"text": "x"}])
    (folder / "test.jsonl").write_text("[")
    task, problems = FilesSource(DataConfig(source="files", path=str(tmp_path))).examine("triage")
    assert len(task.train) == 3
    assert [str(problem).partition(": ")[0] for problem in problems] == [
        f"{folder / 'train.jsonl'}, row 4",
        f"{folder / 'train.jsonl'}, row 5",
        f"{folder / 'test.jsonl'}, row 1",
    ]


def test_what_is_not_there_is_named_with_its_cure(tmp_path):
    assert "needs data.path" in error_of("")
    assert f"{tmp_path / 'no'}: no such folder; set data.path" in error_of(tmp_path / "no")
    assert "holds no task" in error_of(tmp_path)
    folder = make_task(tmp_path)
    unknown = error_of(tmp_path, "triag")
    assert f"unknown task in {tmp_path}: 'triag'; known: triage; did you mean 'triage'?" in unknown
    write_csv(folder / "test.csv", TEST)
    doubled = error_of(tmp_path)
    assert f"{folder}: several files for the split 'test' (test.jsonl, test.csv)" in doubled
    for path in folder.glob("test.*"):
        path.unlink()
    assert f"{folder}: no file for the split 'test'; add" in error_of(tmp_path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path, suffix):
    folder = make_task(tmp_path, suffix)
    path, expected = folder / f"train{suffix}", load(tmp_path)
    empty = [{"text": "  ", "label": 1, "ward": "A"}, {"text": "x", "label": None, "ward": "A"}]
    WRITERS[suffix](path, [*TRAIN[:2], *empty, *TRAIN[2:]])
    assert load(tmp_path) == replace(expected, left_out=2)
    WRITERS[suffix](path, empty)
    assert f"{path}: holds no examples" in error_of(tmp_path)


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "a rash"},
    ]
}
ALPACA = {"instruction": "Be brief.", "input": "What is it?", "output": "a rash"}


@pytest.mark.parametrize("row", [CHAT, ALPACA], ids=["chat", "alpaca"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_well_known_shapes_are_read(tmp_path, suffix, row):
    """As labels, and as texts."""
    import pandas

    folder = make_task(tmp_path)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").unlink()
        if suffix == ".jsonl":
            write_jsonl(folder / f"{split}.jsonl", [row])
        else:
            pandas.DataFrame([row]).to_parquet(folder / f"{split}.parquet")
    text = "Be brief.\nWhat is it?"
    assert load(tmp_path).train == (Example(text, "a rash"),)
    assert load(tmp_path, generation=("triage",)).train == (Example(text, "", target="a rash"),)
    write_jsonl(folder / "train.jsonl", [{"messages": ["hello"]}])
    (folder / "train.parquet").unlink(missing_ok=True)
    assert "row 1: column 'messages' holds others than {role, content}" in error_of(tmp_path)


def test_the_second_text_may_be_missing_or_be_several_but_not_in_every_row(tmp_path):
    folder = make_task(tmp_path)
    pairs = [{"text": "one", "label": 1, "more": more} for more in (None, ["two", "three"], 4)]
    write_jsonl(folder / "train.jsonl", [*TRAIN, *pairs])
    write_jsonl(folder / "test.jsonl", [*TEST, *pairs])
    texts = [example.text for example in load(tmp_path, pair_column="more").train]
    assert texts[3:] == ["one", "one\ntwo\nthree", "one\n4"]
    assert "no row has the column 'mroe'; set data.pair_column" in error_of(
        tmp_path, pair_column="mroe"
    )


def test_the_second_text_keeps_the_name_that_the_run_gives_it(tmp_path):
    folder = make_task(tmp_path)
    pairs = [{"text": "one", "label": 1, "more": more} for more in (None, ["two", "three"])]
    write_jsonl(folder / "train.jsonl", [*TRAIN, *pairs])
    write_jsonl(folder / "test.jsonl", [*TEST, *pairs])
    texts = [example.text for example in load(tmp_path, pair_column="Asked: {more}").train]
    assert texts[3:] == ["one", "one\nAsked: two\nAsked: three"]
    for wrong in ("{more", "{more} and", "{more}{text}", "{}"):
        assert "pair_column" in error_of(tmp_path, pair_column=wrong)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_bad_rows_and_splits_without_any_are_named(tmp_path, suffix):
    folder = make_task(tmp_path, suffix)
    path, row = folder / f"test{suffix}", 3 if suffix == ".csv" else 2
    for bad, problem in (
        ({"text": "x", "label": 3, "ward": "A"}, "'3' is no label of the task (they are: 1, 2)"),
    ):
        WRITERS[suffix](path, [*TEST, bad])
        assert f"{path}, row {row}: {problem}" in error_of(tmp_path)
    WRITERS[suffix](path, [])
    assert f"{path}: holds no examples" in error_of(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_that_a_table_lacks_are_said_once_with_their_keys(tmp_path, suffix):
    folder = make_task(tmp_path, suffix)
    keys = {"text_column": "note", "files": {"triage": TaskColumns(label_column="labels")}}
    assert error_of(tmp_path, **keys) == (
        f"{folder / f'train{suffix}'}: no column 'note' or 'labels'; the columns are: text, label, "
        "ward; set data.text_column and data.label_column"
    )
    source = FilesSource(DataConfig(source="files", path=str(tmp_path), **keys))
    assert len(source.examine("triage")[1]) == 2  # of train and of test, however many rows


def test_a_column_that_some_rows_of_a_jsonl_file_lack_is_named_row_by_row(tmp_path):
    folder = make_task(tmp_path)
    write_jsonl(folder / "train.jsonl", [{"txt": "x", "label": "1"}, *TRAIN])
    assert "train.jsonl, row 1: no column 'text'" in error_of(tmp_path)


def test_declared_labels_are_the_tasks_labels(tmp_path):
    make_task(tmp_path)
    declared = {"triage": ("1", "2", "3"), "later": ("x", "y")}
    data = load(tmp_path, labels=declared)
    assert data.labels == ("1", "2", "3")
    assert len(data.train) == 3
    assert load(tmp_path, "later", labels=declared) == TaskData("later", ("x", "y"), (), ())
    message = error_of(tmp_path, labels={"triage": ("1", "22")})
    assert "row 2: '2' is no label of the task (they are: 1, 22; did you mean '22'?)" in message
    mapped = {"triage": TaskColumns(label_text={"1": "heart ", "2": " skin"})}
    for source in ("files", "site"):
        data = load(tmp_path, files=mapped, labels={"triage": ("skin", "heart")}, source=source)
        assert [example.label for example in data.train] == ["heart", "skin", "heart"]
