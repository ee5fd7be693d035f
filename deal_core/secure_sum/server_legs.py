"""The server's part in a round: replies in, requests out, a leg after the other.

``add_*`` takes one site's reply and refuses a bad one, which costs that site its place in the
round. ``close_*`` ends a leg: it fixes who is in, or says that too few are. ``*_request`` is what a
site is sent; it is the same each time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from deal_core.secure_sum.frames import positions_bytes
from deal_core.secure_sum.identity import fingerprint
from deal_core.secure_sum.keys import usable
from deal_core.secure_sum.masks import ring_type
from deal_core.secure_sum.messages import (
    Confirmed,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Prepared,
    Unmasked,
    UnmaskRequest,
)
from deal_core.secure_sum.protocol_error import BelowThreshold, ProtocolError
from deal_core.secure_sum.server_round import ServerRound


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
