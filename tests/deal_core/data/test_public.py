from __future__ import annotations

import pytest

from deal_core.config.data import DataConfig
from deal_core.data.public import read_public
from deal_core.errors import UserError


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
