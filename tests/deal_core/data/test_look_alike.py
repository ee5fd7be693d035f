from __future__ import annotations

import pytest

from deal_core.data.rows import folded, look_alike


@pytest.mark.parametrize(
    "other",
    [
        "caf\u00e9",
        "Cafe\u0301",
        "caf\u00e9\u200b",
        "\ufeffCaf\u00e9",
        " CAF\u00c9_",
        "\uff23af\u00e9",
    ],
)
def test_labels_that_look_alike_have_one_form(other: str) -> None:
    assert folded(other) == folded("Caf\u00e9")
    assert look_alike(other, ["Cafe", "Caf\u00e9 "]) == (
        f" ('Caf\\xe9 ' looks alike; this one is {other!a})"
    )


@pytest.mark.parametrize(
    ("one", "two"), [("1", "2"), ("1", "10"), ("1.5", "1"), ("a.0", "a"), ("no", "on"), ("01", "1")]
)
def test_others_do_not(one: str, two: str) -> None:
    assert folded(one) != folded(two)
    assert look_alike(one, [two, one]) == ""


def test_whole_numbers_look_like_themselves() -> None:
    assert folded("-3.0") == folded("-3")
