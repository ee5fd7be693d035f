"""What the server holds of a round: never a vector, only the sum of masked ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from deal_core.secure_sum.frames import number_bytes, number_from, pack, unpack
from deal_core.secure_sum.masks import Words, ring_type
from deal_core.secure_sum.messages import Confirmed, Prepared, Unmasked
from deal_core.secure_sum.terms import RoundTerms

Replies = dict[int, bytes]
"""Position of a site -> its reply."""


@dataclass(frozen=True)
class ServerRound:
    """One round; every step gives a new one. Each reply is checked before it is in here.

    Attributes:
        terms: of the round.
        prepared: replies of the first leg.
        members: positions of those whose keys were passed on; None: more may still prepare.
        masked: positions of those whose vectors are in the total.
        total: sum of the masked vectors, in the ring.
        survivors: ``masked`` as it was told to the sites; None: more may still come.
        confirmed: replies of the leg ``confirm``.
        confirmers: positions of those whose tags were passed on; None: more may still come.
        unmasked: replies of the last leg.
    """

    terms: RoundTerms
    total: Words
    prepared: Mapping[int, Prepared] = field(default_factory=dict)
    members: tuple[int, ...] | None = None
    masked: tuple[int, ...] = ()
    survivors: tuple[int, ...] | None = None
    confirmed: Mapping[int, Confirmed] = field(default_factory=dict)
    confirmers: tuple[int, ...] | None = None
    unmasked: Mapping[int, Unmasked] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the record, for a server that may be started again."""
        return pack(
            "server-round",
            self.terms.to_bytes(),
            self.total.tobytes(),
            _replies_bytes({at: each.to_bytes() for at, each in self.prepared.items()}),
            _positions(self.members),
            _positions(self.masked),
            _positions(self.survivors),
            _replies_bytes({at: each.to_bytes() for at, each in self.confirmed.items()}),
            _positions(self.confirmers),
            _replies_bytes({at: each.to_bytes() for at, each in self.unmasked.items()}),
        )

    @staticmethod
    def from_bytes(data: bytes) -> ServerRound:
        """Return the round of a record."""
        parts = unpack("server-round", data, 9)
        terms = RoundTerms.from_bytes(parts[0])
        return ServerRound(
            terms,
            np.frombuffer(parts[1], ring_type(terms.bits)),
            {at: Prepared.from_bytes(each) for at, each in _replies(parts[2]).items()},
            _positions_from(parts[3]),
            _positions_from(parts[4]) or (),
            _positions_from(parts[5]),
            {at: Confirmed.from_bytes(each) for at, each in _replies(parts[6]).items()},
            _positions_from(parts[7]),
            {at: Unmasked.from_bytes(each) for at, each in _replies(parts[8]).items()},
        )


def open_round(terms: RoundTerms) -> ServerRound:
    """Return a round in which nobody has prepared."""
    return ServerRound(terms, np.zeros(terms.length, ring_type(terms.bits)))


def _replies_bytes(replies: Replies) -> bytes:
    return pack("replies", *(number_bytes(at) + reply for at, reply in replies.items()))


def _replies(data: bytes) -> Replies:
    return {number_from(each[:8]): each[8:] for each in unpack("replies", data)}


def _positions(positions: tuple[int, ...] | None) -> bytes:
    if positions is None:
        return b""
    return pack("positions", *(number_bytes(position) for position in positions))


def _positions_from(data: bytes) -> tuple[int, ...] | None:
    if not data:
        return None
    return tuple(number_from(each) for each in unpack("positions", data))
