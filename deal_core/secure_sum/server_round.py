"""The server's part in a round: replies in, requests out, a leg after the other, and the sum.

It holds never a vector, only the sum of masked ones. ``add_*`` takes one site's reply and refuses a
bad one, which costs that site its place in the round. ``close_*`` ends a leg: it fixes who is in,
or says that too few are. ``*_request`` is what a site is sent; it is the same each time.
:func:`unmasked_sum` puts secrets together and takes their masks away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from deal_core.secure_sum.keys import (
    Words,
    add_masks,
    commitment,
    fingerprint,
    mask_private_key,
    pair_mask_key,
    public_half,
    ring_type,
    self_mask_key,
    usable,
)
from deal_core.secure_sum.messages import (
    BelowThreshold,
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
    unpack,
)
from deal_core.secure_sum.shamir import combine, combining_weights
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


def add_prepared(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a reply of ``prepare``; the same one may come again.

    Raises:
        ProtocolError: it is of another round, not as long as it must be, a second one, or its mask
            key is none.
    """
    position, message = held.terms.position(site), Prepared.from_bytes(reply)
    _check_reply(held, site, message.context, len(message.boxes), len(held.terms.cohort) - 1)
    if not usable(message.mask_key):
        raise ProtocolError(f"the mask key of site {fingerprint(site)} is no X25519 key", site)
    if position in held.prepared:
        _check_same(site, held.prepared[position] == message)
        return held
    _check_open(site, held.members is None)
    return replace(held, prepared={**held.prepared, position: message})


def close_prepared(held: ServerRound) -> ServerRound:
    """Return the round with its members fixed: those who have prepared.

    Raises:
        BelowThreshold: too few have prepared.
    """
    _check_enough(held, len(held.prepared), held.terms.least, "prepared")
    return held if held.members is not None else replace(held, members=tuple(sorted(held.prepared)))


def mask_request(held: ServerRound, site: bytes) -> bytes:
    """Return what a member is sent: the others' mask keys, and their boxes for it.

    Raises:
        ProtocolError: the site is no member.
    """
    own = held.terms.position(site)
    members = held.members or ()
    _check_among(held, own, members)
    others = [position for position in members if position != own]
    return MaskRequest(
        held.terms.context,
        positions_bytes(members),
        tuple(held.prepared[other].mask_key for other in others),
        tuple(held.prepared[other].boxes[own - (own > other)] for other in others),
    ).to_bytes()


def add_masked(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a member's masked vector in the total; the vector itself is not kept,
    and a second reply not looked at.

    Raises:
        ProtocolError: it is of another round, of another length, or too late.
    """
    own, message = held.terms.position(site), Masked.from_bytes(reply)
    _check_among(held, own, held.members or ())
    size = held.terms.length * held.terms.bits // 8
    _check_reply(held, site, message.context, len(message.words), size)
    if own in held.masked:
        return held
    _check_open(site, held.survivors is None)
    words = np.frombuffer(message.words, ring_type(held.terms.bits))
    return replace(held, total=held.total + words, masked=tuple(sorted((*held.masked, own))))


def close_masked(held: ServerRound) -> ServerRound:
    """Return the round with its survivors fixed: those whose masked vectors are in the total.

    Raises:
        BelowThreshold: too few have.
    """
    _check_enough(held, len(held.masked), held.terms.least, "survived")
    return held if held.survivors is not None else replace(held, survivors=held.masked)


def confirm_request(held: ServerRound, site: bytes) -> bytes:
    """Return what a survivor is sent: who has survived.

    Raises:
        ProtocolError: the site has not survived.
    """
    survivors = held.survivors or ()
    _check_among(held, held.terms.position(site), survivors)
    return ConfirmRequest(held.terms.context, positions_bytes(survivors)).to_bytes()


def add_confirmed(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a survivor's tags; the same reply may come again.

    Raises:
        ProtocolError: it is of another round, not as long as it must be, or too late.
    """
    own, message = held.terms.position(site), Confirmed.from_bytes(reply)
    survivors = held.survivors or ()
    _check_among(held, own, survivors)
    _check_reply(held, site, message.context, len(message.tags), len(survivors) - 1)
    if own in held.confirmed:
        _check_same(site, held.confirmed[own] == message)
        return held
    _check_open(site, held.confirmers is None)
    return replace(held, confirmed={**held.confirmed, own: message})


def close_confirmed(held: ServerRound) -> ServerRound:
    """Return the round with those fixed whose tags are passed on.

    Raises:
        BelowThreshold: too few have confirmed.
    """
    if not held.terms.confirm:
        return replace(held, confirmers=())
    _check_enough(held, len(held.confirmed), held.terms.threshold, "confirmed")
    if held.confirmers is not None:
        return held
    return replace(held, confirmers=tuple(sorted(held.confirmed)))


def unmask_request(held: ServerRound, site: bytes) -> bytes:
    """Return what a survivor is sent: who has survived, and who was told the same.

    Raises:
        ProtocolError: the site has not survived.
    """
    own, survivors = held.terms.position(site), held.survivors or ()
    _check_among(held, own, survivors)
    confirmers = [position for position in held.confirmers or () if position != own]
    places = {position: place for place, position in enumerate(survivors)}
    return UnmaskRequest(
        held.terms.context,
        positions_bytes(survivors),
        positions_bytes(confirmers),
        tuple(held.confirmed[other].tags[places[own] - (own > other)] for other in confirmers),
    ).to_bytes()


def add_unmasked(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a survivor's shares; the same reply may come again.

    Raises:
        ProtocolError: it is of another round, or not as long as it must be.
    """
    own, message = held.terms.position(site), Unmasked.from_bytes(reply)
    _check_among(held, own, held.survivors or ())
    _check_reply(held, site, message.context, len(message.shares), len(held.members or ()))
    if own in held.unmasked:
        _check_same(site, held.unmasked[own] == message)
        return held
    return replace(held, unmasked={**held.unmasked, own: message})


@dataclass(frozen=True)
class MaskKeys:
    """Streams that are in the total, and those that were taken from it."""

    added: tuple[bytes, ...]
    taken: tuple[bytes, ...]


def unmasked_sum(held: ServerRound) -> Words:
    """Return the sum of the survivors' vectors, exact in the ring.

    Some false shares are survived as long as a run of ``threshold`` answers without them is left.

    Raises:
        BelowThreshold: too few have revealed their shares.
        ProtocolError: the shares put together are not what a site has committed to.
    """
    answers, needed = sorted(held.unmasked), held.terms.threshold
    if len(answers) < needed:
        raise BelowThreshold(
            f"round {held.terms.number}: {len(answers)} of {len(held.terms.cohort)} sites revealed "
            f"their shares, below the threshold of {needed}: the round ends without a sum"
        )
    windows = 1 if len(answers) == needed else len(answers)
    for start in range(windows):
        window = [answers[(start + k) % len(answers)] for k in range(needed)]
        try:
            keys = mask_keys(held, window)
        except ProtocolError:
            if start == windows - 1:
                raise
            continue
        break
    total = held.total.copy()
    add_masks(total, keys.taken, keys.added)
    return total


def mask_keys(held: ServerRound, answers: Sequence[int]) -> MaskKeys:
    """Return the streams that are left in the total.

    Args:
        held: the round after its last leg.
        answers: positions of as many answers as the threshold.

    Raises:
        ProtocolError: a secret is not its site's.
    """
    context, members = held.terms.context, held.members or ()
    survivors = held.survivors or ()
    weights = combining_weights([position + 1 for position in answers])
    added: list[bytes] = []
    taken: list[bytes] = []
    for place, member in enumerate(members):
        prepared = held.prepared[member]
        seed = combine(weights, [held.unmasked[at].shares[place] for at in answers])
        if member in survivors:
            _check_secret(held, member, commitment(seed, context) == prepared.commitment)
            added.append(self_mask_key(seed, context))
            continue
        private = mask_private_key(seed, context)
        _check_secret(held, member, public_half(private) == prepared.mask_key)
        for survivor in survivors:
            public = held.prepared[survivor].mask_key
            key = pair_mask_key(private, public, context, member, survivor)
            (added if survivor < member else taken).append(key)
    return MaskKeys(tuple(added), tuple(taken))


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


def _check_reply(held: ServerRound, site: bytes, context: bytes, size: int, expected: int) -> None:
    if context != held.terms.context:
        raise ProtocolError(f"the reply of site {fingerprint(site)} is of another round", site)
    if size != expected:
        raise ProtocolError(f"the reply of site {fingerprint(site)} has a wrong length", site)


def _check_among(held: ServerRound, position: int, positions: tuple[int, ...]) -> None:
    if position not in positions:
        site = held.terms.cohort[position]
        raise ProtocolError(f"site {fingerprint(site)} is out of this leg of the round", site)


def _check_open(site: bytes, is_open: bool) -> None:
    if not is_open:
        raise ProtocolError(f"the reply of site {fingerprint(site)} came too late", site)


def _check_same(site: bytes, same: bool) -> None:
    if not same:
        raise ProtocolError(f"site {fingerprint(site)} has replied twice, and differently", site)


def _check_enough(held: ServerRound, number: int, least: int, what: str) -> None:
    if number < least:
        raise BelowThreshold(
            f"round {held.terms.number}: {number} of {len(held.terms.cohort)} sites {what}, below "
            f"the {least} that a sum needs: the round ends without one"
        )


def _check_secret(held: ServerRound, member: int, fits: bool) -> None:
    if not fits:
        site = held.terms.cohort[member]
        raise ProtocolError(
            f"round {held.terms.number}: the shares of site {fingerprint(site)} do not give the "
            "secret it has committed to: the round ends without a sum",
            site,
        )
