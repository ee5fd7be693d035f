"""Files that are damaged, or say two things at once: each is refused in one line, and what nobody
reads harms nobody."""

import json
import zipfile
from collections.abc import Sequence
from typing import Any

import openpyxl
import pytest

from deal_core.config.data import DataConfig
from deal_core.data import read_public
from deal_core.data.files import SiteSource, repeated_identifiers
from deal_core.data.rows import Columns, to_example
from deal_core.data.source import Example
from deal_core.data.tables import read_table
from deal_core.errors import UserError

COLUMNS = Columns("text", "label")
Table = Sequence[Sequence[Any]]


def examples(path):
    return [to_example(row, COLUMNS, str(path), number) for number, row in read_table(path)]


def refusal(path):
    with pytest.raises(UserError) as caught:
        examples(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def write_csv(path, rows):
    path = path.with_suffix(".csv")
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def write_excel(path, rows):
    path, book = path.with_suffix(".xlsx"), openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def write_parquet(path, rows):
    import pyarrow as pa

    values = [pa.array(column) for column in zip(*rows[1:], strict=True)]
    return save(path, pa.Table.from_arrays(values, names=list(rows[0])))


def save(path, table):
    import pyarrow.parquet as pq

    path = path.with_suffix(".parquet")
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("write", "place"),
    [(write_csv, ", row 1"), (write_excel, ", row 1"), (write_parquet, "")],
)
def test_two_columns_of_one_name_are_refused(tmp_path, write, place):
    path = write(tmp_path / "train", [("text", "label", "label"), ("a", "x", "WRONG")])
    assert refusal(path) == f"{place}: column 'label' occurs twice; rename one"


def test_the_header_of_a_sheet_is_its_first_row_with_a_value(tmp_path):
    rows = [(None,), ("text", None, "label", None), ("a", "note", 1, None), (None,), ("b", "", 2)]
    path = write_excel(tmp_path / "train", rows)
    assert examples(path) == [Example("a", "1"), Example("b", "2")]
    assert [number for number, _ in read_table(path)] == [3, 5]
    assert [list(row) for _, row in read_table(path)] == [["text", "label"]] * 2


SHEET = [("text", "label"), *((f"text {n}", "x") for n in range(3000))]


def changed(path, part, change):
    """The workbook with another content of one of its parts."""
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    with zipfile.ZipFile(path, "w") as book:
        for name, content in parts.items():
            book.writestr(name, change(content) if name.endswith(part) else content)
    return path


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("sheet1.xml", lambda xml: xml[: len(xml) // 2]),  # ParseError
        ("sheet1.xml", lambda xml: b""),
        (
            "sheet1.xml",  # IndexError: a text that is in no list of texts
            lambda xml: xml.replace(b't="inlineStr"><is><t>x</t></is>', b't="s"><v>7</v>'),
        ),
        ("[Content_Types].xml", lambda xml: xml.replace(b"PartName", b"Part4ame", 1)),  # TypeError
    ],
)
def test_a_workbook_with_a_damaged_part_is_one_line(tmp_path, part, change):
    path = changed(write_excel(tmp_path / "train", SHEET[:9]), part, change)
    assert ": not a readable Excel workbook (" in refusal(path)


def no_text():
    """A column of texts whose second is not UTF-8."""
    import pyarrow as pa

    values = pa.array([b"good", b"\xff\xfe"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 2, values.buffers())


def no_date():
    """A column of times, the second in a year that Python does not know."""
    import pyarrow as pa

    return pa.array([0, 2 * 253402300800000000], pa.timestamp("us"))


@pytest.mark.parametrize("column", [no_text, no_date])
def test_what_nobody_reads_of_a_parquet_file_harms_nobody(tmp_path, column):
    import pyarrow as pa

    table = pa.table(
        {"text": ["a", "b"], "label": ["x", "y"], "note": column(), "patient_id": [1, 1]}
    )
    (tmp_path / "ward").mkdir()
    path = save(tmp_path / "ward" / "train", table)
    assert examples(path) == [Example("a", "x"), Example("b", "y")]
    (found,) = repeated_identifiers(DataConfig(source="files", path=str(tmp_path)))
    assert found[0] == "patient_id"


def test_a_value_that_cannot_be_read_is_a_matter_of_its_row(tmp_path):
    import pyarrow as pa

    (tmp_path / "ward").mkdir()
    for split in ("train", "test"):
        save(tmp_path / "ward" / split, pa.table({"text": no_text(), "label": ["x", "x"]}))
    config = DataConfig(source="site", path=str(tmp_path), labels={"ward": ("x",)})
    data = SiteSource(config).load("ward")
    assert data.train == data.test == (Example("good", "x"),)
    assert data.left_out == 2


def test_a_column_of_a_parquet_file_whose_name_is_no_text_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "train", [("text", "label", "notes"), ("a", "x", "n")])
    path.write_bytes(path.read_bytes().replace(b"notes", b"not\xff\xfe"))
    assert refusal(path).startswith(", row 1: not a readable Parquet file (")


def test_a_number_of_very_many_digits_is_text(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "a", "label": "x", "n": 0})[:-2] + "1" * 5000 + "}\n")
    assert [(each.text, each.label) for each in examples(path)] == [("a", "x")]
    assert next(read_table(path))[1]["n"] == "1" * 5000


def test_a_long_field_is_read_and_an_open_quote_has_a_cure_of_its_own(tmp_path):
    path = write_csv(tmp_path / "train", [("text", "label"), ("a" * 200_000, "x")])
    assert len(examples(path)[0].text) == 200_000
    path.write_text('text,label\na,x\n"b,x\n' + "c,x\n" * 50_000)
    assert refusal(path) == ", row 3: not valid CSV: its quotes are never closed; close them"


def test_lines_of_text_each_once(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n  two \none\n", encoding="utf-8")
    assert read_public(str(path), DataConfig()) == ["one", "two"]


def test_rows_need_no_label(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"question": "one", "more": "x"}\n{"question": "two", "more": ""}\n')
    config = DataConfig(text_column="question", pair_column="more")
    assert read_public(str(path), config) == ["one\nx", "two"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("texts.txt", None, "no such file"),
        ("texts.txt", b"\n \n", "holds no texts"),
        ("texts.txt", b"\xff\xfe\x00", "row 1: not UTF-8"),
        ("texts.jsonl", b'{"text": "a"}\n{"question": "b"}\n', "row 2: no column 'text'"),
        ("texts.jsonl", b'{"text": ""}\n', "row 1: column 'text' is empty"),
    ],
)
def test_a_fault_is_one_line_with_the_place(tmp_path, name, content, fault):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_public(str(path), DataConfig())
    assert str(path) in str(error.value)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)
