"""The server's part in a round: replies in, requests out, an exchange after the other, and the sum.

It holds never a vector, only the sum of masked ones. ``add_*`` takes one site's reply, the same one
as often as it comes, and refuses a bad one with ProtocolError, which costs that site its place in
the round. ``close_*`` ends an exchange: it fixes who is in, or raises BelowThreshold: too few are.
``*_request`` is what a site is sent; it is the same each time, and ProtocolError for a site that is
out. :func:`unmasked_sum` puts secrets together and takes their masks away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from deal_core.secure_sum import keys
from deal_core.secure_sum.keys import Words, fingerprint
from deal_core.secure_sum.messages import (
    Confirmed,
    ConfirmRequest,
    Kept,
    Masked,
    MaskRequest,
    Prepared,
    ProtocolError,
    RoundMessage,
    Unmasked,
    UnmaskRequest,
    positions_bytes,
)
from deal_core.secure_sum.shamir import combine, combining_weights
from deal_core.secure_sum.terms import RoundTerms


@dataclass(frozen=True)
class ServerRound(Kept):
    """One round; every step gives a new one. Each reply is checked before it is in here.

    Attributes:
        terms: of the round.
        total: sum of the masked vectors: ring words, little endian.
        prepared: position of a site to its reply of the first exchange.
        members: positions of those whose keys were passed on; None: more may still prepare.
        masked: positions of those whose vectors are in the total.
        survivors: ``masked`` as it was told to the sites; None: more may still come.
        confirmed: replies of the exchange ``confirm``.
        confirmers: positions of those whose tags were passed on; None: more may still come.
        unmasked: replies of the last exchange.
    """

    terms: RoundTerms
    total: bytes
    prepared: Mapping[int, Prepared] = field(default_factory=dict)
    members: tuple[int, ...] | None = None
    masked: tuple[int, ...] = ()
    survivors: tuple[int, ...] | None = None
    confirmed: Mapping[int, Confirmed] = field(default_factory=dict)
    confirmers: tuple[int, ...] | None = None
    unmasked: Mapping[int, Unmasked] = field(default_factory=dict)


def open_round(terms: RoundTerms) -> ServerRound:
    """Return a round in which nobody has prepared."""
    return ServerRound(terms, bytes(terms.length * terms.bits // 8))


def add_prepared(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a reply of ``prepare``, whose mask key is one."""
    position, message = held.terms.position(site), Prepared.from_bytes(reply)
    others = len(held.terms.cohort) - 1
    _check_reply(held, site, message, len(message.encrypted_shares), others)
    if not keys.usable(message.mask_key):
        raise ProtocolError(f"the mask key of site {fingerprint(site)} is no X25519 key", site)
    if _is_known(site, message, held.prepared.get(position), held.members is None):
        return held
    return replace(held, prepared={**held.prepared, position: message})


def close_prepared(held: ServerRound) -> ServerRound:
    """Return the round with its members fixed: those who have prepared."""
    held.terms.require_enough(len(held.prepared), "prepared", held.terms.least)
    return held if held.members is not None else replace(held, members=tuple(sorted(held.prepared)))


def mask_request(held: ServerRound, site: bytes) -> bytes:
    """Return what a member is sent: the others' mask keys, and their shares for it."""
    own, others = _own_and_others(held, site, held.members)
    return MaskRequest(
        held.terms.context,
        positions_bytes([own, *others]),
        tuple(held.prepared[other].mask_key for other in others),
        tuple(held.prepared[other].encrypted_shares[own - (own > other)] for other in others),
    ).to_bytes()


def add_masked(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a member's masked vector in the total; the vector itself is not kept,
    and a second reply not looked at."""
    own, _ = _own_and_others(held, site, held.members)
    message = Masked.from_bytes(reply)
    size = held.terms.length * held.terms.bits // 8
    _check_reply(held, site, message, len(message.words), size)
    if own in held.masked or _is_known(site, message, None, held.survivors is None):
        return held
    total, more = (
        np.frombuffer(w, keys.ring_type(held.terms.bits)) for w in (held.total, message.words)
    )
    masked = tuple(sorted((*held.masked, own)))
    return replace(held, total=(total + more).tobytes(), masked=masked)


def close_masked(held: ServerRound) -> ServerRound:
    """Return the round with its survivors fixed: those whose masked vectors are in the total."""
    held.terms.require_enough(len(held.masked), "survived", held.terms.least)
    return held if held.survivors is not None else replace(held, survivors=held.masked)


def confirm_request(held: ServerRound, site: bytes) -> bytes:
    """Return what a survivor is sent: who has survived."""
    own, others = _own_and_others(held, site, held.survivors)
    return ConfirmRequest(held.terms.context, positions_bytes([own, *others])).to_bytes()


def add_confirmed(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a survivor's tags."""
    own, others = _own_and_others(held, site, held.survivors)
    message = Confirmed.from_bytes(reply)
    _check_reply(held, site, message, len(message.tags), len(others))
    if _is_known(site, message, held.confirmed.get(own), held.confirmers is None):
        return held
    return replace(held, confirmed={**held.confirmed, own: message})


def close_confirmed(held: ServerRound) -> ServerRound:
    """Return the round with those fixed whose tags are passed on."""
    held.terms.require_enough(len(held.confirmed), "confirmed", held.terms.threshold)
    if held.confirmers is not None:
        return held
    return replace(held, confirmers=tuple(sorted(held.confirmed)))


def unmask_request(held: ServerRound, site: bytes) -> bytes:
    """Return what a survivor is sent: who has survived, and who was told the same."""
    own, others = _own_and_others(held, site, held.survivors)
    survivors = sorted([own, *others])
    confirmers = [position for position in held.confirmers or () if position != own]
    place = survivors.index(own)
    return UnmaskRequest(
        held.terms.context,
        positions_bytes(survivors),
        positions_bytes(confirmers),
        tuple(held.confirmed[other].tags[place - (own > other)] for other in confirmers),
    ).to_bytes()


def add_unmasked(held: ServerRound, site: bytes, reply: bytes) -> ServerRound:
    """Return the round with a survivor's shares."""
    own, _ = _own_and_others(held, site, held.survivors)
    message = Unmasked.from_bytes(reply)
    _check_reply(held, site, message, len(message.shares), len(held.members or ()))
    if _is_known(site, message, held.unmasked.get(own), True):
        return held
    return replace(held, unmasked={**held.unmasked, own: message})


def unmasked_sum(held: ServerRound) -> Words:
    """Return the sum of the survivors' vectors, exact in the ring.

    Some false shares are survived as long as a run of ``threshold`` answers without them is left.

    Raises:
        BelowThreshold: too few have revealed their shares.
        ProtocolError: the shares put together are not what a site has committed to.
    """
    answers, needed = sorted(held.unmasked), held.terms.threshold
    held.terms.require_enough(len(answers), "revealed their shares", needed)
    windows = 1 if len(answers) == needed else len(answers)
    for start in range(windows):
        window = [answers[(start + k) % len(answers)] for k in range(needed)]
        try:
            added, taken = _mask_keys(held, window)
        except ProtocolError:
            if start == windows - 1:
                raise
            continue
        break
    total = np.frombuffer(held.total, keys.ring_type(held.terms.bits)).copy()
    keys.add_masks(total, taken, added)
    return total


def _mask_keys(held: ServerRound, answers: Sequence[int]) -> tuple[list[bytes], list[bytes]]:
    """Return the keys of streams that are in the total, and of those that were taken from it."""
    context, survivors = held.terms.context, held.survivors or ()
    weights = combining_weights([position + 1 for position in answers])
    added: list[bytes] = []
    taken: list[bytes] = []
    for place, member in enumerate(held.members or ()):
        prepared = held.prepared[member]
        seed = combine(weights, [held.unmasked[at].shares[place] for at in answers])
        if member in survivors:
            _check_secret(held, member, keys.commitment(seed, context) == prepared.commitment)
            added.append(keys.self_mask_key(seed, context))
            continue
        private = keys.mask_private_key(seed, context)
        _check_secret(held, member, keys.public_half(private) == prepared.mask_key)
        for survivor in survivors:
            public = held.prepared[survivor].mask_key
            key = keys.pair_mask_key(private, public, context, member, survivor)
            (added if survivor < member else taken).append(key)
    return added, taken


def _own_and_others(
    held: ServerRound, site: bytes, among: Iterable[int] | None
) -> tuple[int, list[int]]:
    """Return the positions of a site that is in an exchange, and of the others that are."""
    own, positions = held.terms.position(site), list(among or ())
    if own not in positions:
        raise ProtocolError(f"site {fingerprint(site)} is out of this exchange of the round", site)
    return own, [position for position in positions if position != own]


def _check_reply(
    held: ServerRound, site: bytes, message: RoundMessage, size: int, expected: int
) -> None:
    if message.context != held.terms.context:
        raise ProtocolError(f"the reply of site {fingerprint(site)} is of another round", site)
    if size != expected:
        raise ProtocolError(f"the reply of site {fingerprint(site)} has a wrong length", site)


def _is_known(
    site: bytes, message: RoundMessage, before: RoundMessage | None, is_open: bool
) -> bool:
    """Return whether a site has sent this reply before; refuse another one, and a late one."""
    if before is not None and before != message:
        raise ProtocolError(f"site {fingerprint(site)} has replied twice, and differently", site)
    if before is None and not is_open:
        raise ProtocolError(f"the reply of site {fingerprint(site)} came too late", site)
    return before is not None


def _check_secret(held: ServerRound, member: int, fits: bool) -> None:
    if not fits:
        site = held.terms.cohort[member]
        raise ProtocolError(
            f"round {held.terms.number}: the shares of site {fingerprint(site)} do not give the "
            "secret it has committed to: the round ends without a sum",
            site,
        )
