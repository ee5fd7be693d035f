"""Bytes: each value has one form, and what is no value is refused by one line. The page alone says
how messages are written: they are made here from its table."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.secure_sum.keys import Announcement
from deal_core.secure_sum.messages import (
    Confirmed,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Prepared,
    ProtocolError,
    Unmasked,
    UnmaskRequest,
    number_bytes,
    number_from,
    pack,
    positions_bytes,
    positions_from,
    split,
    unpack,
)
from deal_core.secure_sum.server_round import ServerRound
from deal_core.secure_sum.site_state import SiteState
from deal_core.secure_sum.terms import RoundTerms
from tests.deal_core.secure_sum.rounds import Round, first, integers, met, terms_of, vectors

KINDS = (
    Announcement, Confirmed, ConfirmRequest, Masked, MaskRequest, Prepared, RoundTerms,
    ServerRound, SiteState, Unmasked, UnmaskRequest,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    """A round of five sites in which one drops out."""
    states = first(met(5), 5)
    layout = integers(3, 5)
    round_ = Round(terms_of(states, layout), states, vectors(states, layout), {"mask": [3]})
    round_.total()
    return round_


@pytest.fixture(scope="module")
def records(whole):
    """Every kind of message and record."""
    state = whole.states[whole.terms.cohort[0]]
    messages = [*whole.sent.values(), *whole.received.values()]
    return [*messages, state.announcement, state.to_bytes(), whole.held.to_bytes()]


def kind_of(data):
    for kind in KINDS:
        try:
            return kind.from_bytes(data)
        except ProtocolError:
            continue
    return None


def test_every_record_comes_back_from_its_bytes(records):
    seen = set()
    for data in records:
        value = kind_of(data)
        assert value is not None
        assert value.to_bytes() == data
        seen.add(type(value))
    assert seen == set(KINDS)


def test_what_is_cut_short_or_too_long_is_refused(records):
    for data in records:
        kind = type(kind_of(data))
        for spoilt in (data[:-1], data[: len(data) // 2], data + b"\0", b"", b"DSS1" + data[4:]):
            with pytest.raises(ProtocolError):
                kind.from_bytes(spoilt)


@given(st.text("abc-", max_size=9), st.lists(st.binary(max_size=9), max_size=4))
def test_frames(kind, parts):
    assert unpack(kind, pack(kind, *parts)) == parts
    with pytest.raises(ProtocolError, match="cut short or too long"):
        unpack(kind, pack(kind, *parts), len(parts) + 1)
    with pytest.raises(ProtocolError, match="of this version"):
        unpack(kind + "x", pack(kind, *parts))


@given(st.sets(st.integers(0, 70)))
def test_positions(positions):
    data = positions_bytes(positions)
    assert positions_from(data, 71) == tuple(sorted(positions))
    for spoilt, below in ((data + b"\0", 71), (data, max(positions, default=0))):
        if spoilt != data or positions:
            with pytest.raises(ProtocolError, match="not in the cohort"):
                positions_from(spoilt, below)


def test_numbers_and_lists():
    assert number_from(number_bytes(2**40)) == 2**40
    for data in (b"\1", number_bytes(2**63)):
        with pytest.raises(ProtocolError, match="out of range"):
            number_from(data)
    assert split(b"abcd", 2) == (b"ab", b"cd")
    with pytest.raises(ProtocolError, match="wrong length"):
        split(b"abc", 2)


PAGE = Path(__file__).parents[3] / "docs" / "secure-aggregation.md"
ROW = re.compile(r"^\| `([a-z-]+)` \| (\w+) \| (site|server) \| (`.*) \|$", re.MULTILINE)
PART = re.compile(r"`(\w+)` (\w+(?: each)?)")
NAMED = {
    "announcement": Announcement, "terms": RoundTerms, "prepared": Prepared,
    "mask-request": MaskRequest, "masked": Masked, "confirm-request": ConfirmRequest,
    "confirmed": Confirmed, "unmask-request": UnmaskRequest, "unmasked": Unmasked,
}  # fmt: skip
WRITTEN = {
    "text": str.encode,
    "number": lambda value: int(value).to_bytes(8, "little"),
    "set": bytes,
    "bytes": bytes,
}


def written(value, encoding):
    """A part, by the word that the table has for it."""
    if encoding in WRITTEN:
        return WRITTEN[encoding](value)
    size, *each = encoding.split()
    items = value if each else [value]
    assert {len(item) for item in items} <= {int(size)}
    return b"".join(items)


def frame(kind, parts):
    """As the page has it."""
    framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return b"DSS2" + bytes([len(kind)]) + kind.encode() + framed


@pytest.fixture(scope="module")
def messages(whole):
    """(exchange, sender) -> all such messages of a round."""
    found = {("announce", "site"): [state.announcement for state in whole.states.values()]}
    for sender, passed in (("server", whole.sent), ("site", whole.received)):
        for (exchange, _), data in passed.items():
            found.setdefault((exchange, sender), []).append(data)
    return found


@pytest.fixture(scope="module")
def rows():
    """(exchange, sender) -> kind, parts."""
    said = ROW.findall(PAGE.read_text())
    return {
        (exchange, sender): (kind, PART.findall(parts)) for kind, exchange, sender, parts in said
    }


def test_every_message_of_a_round_is_in_the_table(messages, rows):
    assert rows.keys() == messages.keys()
    assert [kind for kind, _ in rows.values()] == list(NAMED)


@pytest.mark.parametrize("kind", NAMED)
def test_a_message_made_from_the_table_is_the_message(messages, rows, kind):
    (place,) = [place for place, (named, _) in rows.items() if named == kind]
    _, parts = rows[place]
    for data in messages[place]:
        value = NAMED[kind].from_bytes(data)
        made = [written(getattr(value, name), encoding) for name, encoding in parts]
        assert frame(kind, made) == data


def test_sets_of_positions_are_bits_in_as_few_bytes_as_they_need(messages):
    """Five sites; the fourth has sent no vector."""
    for data in messages["confirm", "server"]:
        assert ConfirmRequest.from_bytes(data).survivors == bytes([0b10111])
    for data in messages["mask", "server"]:
        assert MaskRequest.from_bytes(data).members == bytes([0b11111])
