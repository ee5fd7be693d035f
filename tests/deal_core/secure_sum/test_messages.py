"""Bytes: each value has one form, and what is no value is refused by one line."""

from __future__ import annotations

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
def records() -> list[bytes]:
    """Every kind of message and record, of a round in which one site drops out."""
    states = first(met(5), 4)
    layout = integers(3, 4)
    round_ = Round(terms_of(states, layout), states, vectors(states, layout), {"mask": [3]})
    round_.total()
    site = round_.terms.cohort[0]
    messages = [*round_.sent.values(), *round_.received.values()]
    state = round_.states[site]
    return [*messages, state.announcement, state.to_bytes(), round_.held.to_bytes()]


def kind_of(data: bytes):
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
