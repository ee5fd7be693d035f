"""The page alone says how messages are written: they are made here from its table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deal_core.secure_sum.keys import Announcement
from deal_core.secure_sum.messages import (
    Confirmed,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Prepared,
    Unmasked,
    UnmaskRequest,
)
from deal_core.secure_sum.terms import RoundTerms
from tests.deal_core.secure_sum.rounds import Round, first, integers, met, terms_of, vectors

PAGE = Path(__file__).parents[3] / "docs" / "secure-aggregation.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (\w+) \| (site|server) \| (`.*) \|$", re.MULTILINE)
PART = re.compile(r"`(\w+)` (\w+(?: each)?)")
KINDS = {
    "announcement": Announcement, "terms": RoundTerms, "prepared": Prepared,
    "mask-request": MaskRequest, "masked": Masked, "confirm-request": ConfirmRequest,
    "confirmed": Confirmed, "unmask-request": UnmaskRequest, "unmasked": Unmasked,
}  # fmt: skip
WRITTEN: dict[str, Callable[[Any], bytes]] = {
    "text": str.encode,
    "number": lambda value: int(value).to_bytes(8, "little"),
    "set": bytes,
    "bytes": bytes,
}


def written(value: Any, encoding: str) -> bytes:
    """A part, by the word that the table has for it."""
    if encoding in WRITTEN:
        return WRITTEN[encoding](value)
    size, *each = encoding.split()
    items = value if each else [value]
    assert {len(item) for item in items} <= {int(size)}
    return b"".join(items)


def frame(kind: str, parts: list[bytes]) -> bytes:
    """As the page has it."""
    framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return b"DSS2" + bytes([len(kind)]) + kind.encode() + framed


@pytest.fixture(scope="module")
def messages() -> dict[tuple[str, str], list[bytes]]:
    """(leg, sender) -> all such messages of a round in which a site drops out."""
    states = first(met(5), 5)
    layout = integers(3, 5)
    round_ = Round(terms_of(states, layout), states, vectors(states, layout), {"mask": [3]})
    round_.total()
    found = {("announce", "site"): [state.announcement for state in states.values()]}
    for sender, passed in (("server", round_.sent), ("site", round_.received)):
        for (leg, _), data in passed.items():
            found.setdefault((leg, sender), []).append(data)
    return found


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], tuple[str, list[tuple[str, str]]]]:
    """(leg, sender) -> kind, parts."""
    said = ROW.findall(PAGE.read_text())
    return {(leg, sender): (kind, PART.findall(parts)) for kind, leg, sender, parts in said}


def test_every_message_of_a_round_is_in_the_table(messages, rows):
    assert rows.keys() == messages.keys()
    assert [kind for kind, _ in rows.values()] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_made_from_the_table_is_the_message(messages, rows, kind):
    (place,) = [place for place, (named, _) in rows.items() if named == kind]
    _, parts = rows[place]
    for data in messages[place]:
        value = KINDS[kind].from_bytes(data)
        made = [written(getattr(value, name), encoding) for name, encoding in parts]
        assert frame(kind, made) == data


def test_sets_of_positions_are_bits_in_as_few_bytes_as_they_need(messages):
    """Five sites; the fourth has sent no vector."""
    for data in messages["confirm", "server"]:
        assert ConfirmRequest.from_bytes(data).survivors == bytes([0b10111])
    for data in messages["mask", "server"]:
        assert MaskRequest.from_bytes(data).members == bytes([0b11111])
