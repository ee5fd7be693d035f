"""Words of every script: what a right answer shares with what a model wrote."""

from __future__ import annotations

import pytest

from deal_core.training.text_overlap import exact_match, rouge_1, rouge_l, words


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
