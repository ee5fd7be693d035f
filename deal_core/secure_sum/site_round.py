"""A site's part in a round: request in, checked, new state and reply out.

The exchanges are SecAgg's: ``prepare`` (ShareKeys), ``mask`` (MaskedInputCollection), ``confirm``
(ConsistencyCheck) and ``unmask`` (Unmasking). Whoever calls these keeps the new state durably
*before* the reply leaves. Then, after a restart, an equal request gets the same bytes, another one
is refused, and no secret is used twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hmac import compare_digest

from deal_core.secure_sum import keys
from deal_core.secure_sum.keys import fingerprint
from deal_core.secure_sum.layout import Encoded
from deal_core.secure_sum.messages import (
    Confirmed,
    ConfirmRequest,
    Masked,
    MaskRequest,
    Prepared,
    ProtocolError,
    Unmasked,
    UnmaskRequest,
    positions_from,
)
from deal_core.secure_sum.shamir import SECRET_BYTES, split
from deal_core.secure_sum.site_state import Answered, SiteRound, SiteState
from deal_core.secure_sum.terms import RoundTerms, SitePolicy

EXCHANGES = ("prepare", "mask", "confirm", "unmask")


@dataclass(frozen=True)
class Answer:
    """The state to keep, and then the reply to send."""

    state: SiteState
    reply: bytes


def prepare(
    state: SiteState,
    request: bytes,
    policy: SitePolicy,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Answer:
    """Return the state with the round's secrets, and their shares for the cohort.

    Args:
        state: of this site, which has met all of the cohort.
        request: the terms.
        policy: what this site asks of a round.
        random_bytes: number of bytes -> fresh random bytes.

    Raises:
        ProtocolError: the terms are weaker than the policy, name a site that is not known, or are
            those of a round that is past.
    """
    terms = RoundTerms.from_bytes(request)
    policy.check(terms)  # that of today, also of what was answered before
    if (reply := stored_reply(state, "prepare", request)) is not None:
        return Answer(state, reply)
    _check_new_round(state, terms)
    own, context, sites = terms.position(state.site), terms.context, len(terms.cohort)
    mask_seed, self_seed = random_bytes(SECRET_BYTES), random_bytes(SECRET_BYTES)
    mask_key = keys.public_half(keys.mask_private_key(mask_seed, context))
    of_mask_seed = split(mask_seed, terms.threshold, sites, random_bytes)
    of_self_seed = split(self_seed, terms.threshold, sites, random_bytes)
    shares = [first + second for first, second in zip(of_mask_seed, of_self_seed, strict=True)]
    encrypted = tuple(
        keys.encrypt_shares(state.channel(peer), context, own, position, mask_key, shares[position])
        for position, peer in enumerate(terms.cohort)
        if position != own
    )
    prepared = Prepared(context, mask_key, keys.commitment(self_seed, context), encrypted)
    fresh = SiteRound(terms, mask_seed, self_seed, shares[own])
    return _answer(state, fresh, "prepare", request, prepared.to_bytes())


def require_maskable(state: SiteState, request: bytes) -> None:
    """Check, before there is a vector, that :func:`mask` would take this request.

    Raises:
        BelowThreshold: too few have prepared.
        ProtocolError: no such round, another exchange's turn, or a share that does not open.
    """
    if stored_reply(state, "mask", request) is None:
        _opened(state, request)


def mask(state: SiteState, request: bytes, encoded: Encoded) -> Answer:
    """Return the state with the peers' shares, and the masked vector: with the site's own mask,
    those shared with later peers, less those with earlier ones.

    Args:
        state: of this site.
        request: mask keys and encrypted shares of all who prepared.
        encoded: the site's vector in the ring; not looked at where the request was answered
            before.

    Raises:
        BelowThreshold: too few have prepared.
        ProtocolError: a share does not open, or the vector is not the one that was agreed.
    """
    if (reply := stored_reply(state, "mask", request)) is not None:
        return Answer(state, reply)
    current, pairs, opened = _opened(state, request)
    terms = current.terms
    if encoded.layout != terms.layout or encoded.sites < len(terms.cohort):
        raise ProtocolError("the vector is laid out otherwise than the round's terms say")
    if len(encoded.words) != terms.length or encoded.words.dtype.itemsize * 8 != terms.bits:
        raise ProtocolError("the vector has not the length or the ring of the round's terms")
    own, words = terms.position(state.site), encoded.words.copy()
    later = [key for peer, key in pairs.items() if peer > own]
    earlier = [key for peer, key in pairs.items() if peer < own]
    keys.add_masks(words, [keys.self_mask_key(current.self_seed, terms.context), *later], earlier)
    shares = tuple(share for _, share in sorted(opened.items()))
    changed = replace(current, mask_seed=b"", self_seed=b"", own_shares=b"", shares=shares)
    reply = Masked(terms.context, words.tobytes()).to_bytes()
    return _answer(state, changed, "mask", request, reply)


def confirm(state: SiteState, request: bytes) -> Answer:
    """Return the state with the survivors, and for every other survivor a tag of what this site was
    told.

    Raises:
        BelowThreshold: too few have survived.
        ProtocolError: a survivor that had not prepared, or an exchange out of turn.
    """
    if (reply := stored_reply(state, "confirm", request)) is not None:
        return Answer(state, reply)
    message = ConfirmRequest.from_bytes(request)
    current = state.round_of(message.context)
    _check_turn(current, "confirm")
    terms, own = current.terms, current.terms.position(state.site)
    others = [peer for peer in _checked_survivors(current, message.survivors, own) if peer != own]
    channels = [state.channel(terms.cohort[peer]) for peer in others]
    tags = tuple(
        keys.agreement_tag(channel, terms.context, own, peer, message.survivors)
        for peer, channel in zip(others, channels, strict=True)
    )
    changed = replace(current, survivors=message.survivors)
    return _answer(state, changed, "confirm", request, Confirmed(terms.context, tags).to_bytes())


def unmask(state: SiteState, request: bytes) -> Answer:
    """Return a share of every member, of its self seed where it survived, of its mask seed where it
    dropped out; the other half is never given.

    Args:
        state: of this site.
        request: the survivors, and the tags of those who were told the same.

    Raises:
        BelowThreshold: too few have survived, or were told the same survivors.
        ProtocolError: other survivors than were confirmed, or an exchange out of turn.
    """
    if (reply := stored_reply(state, "unmask", request)) is not None:
        return Answer(state, reply)
    message = UnmaskRequest.from_bytes(request)
    current = state.round_of(message.context)
    _check_turn(current, "unmask")
    terms, own = current.terms, current.terms.position(state.site)
    survivors = _checked_survivors(current, message.survivors, own)
    _check_agreement(state, current, message, own)
    revealed = tuple(
        both[SECRET_BYTES:] if position in survivors else both[:SECRET_BYTES]
        for position, both in zip(_members(current), current.shares, strict=True)
    )
    changed = replace(current, shares=(), survivors=message.survivors)
    return _answer(state, changed, "unmask", request, Unmasked(terms.context, revealed).to_bytes())


def stored_reply(state: SiteState, exchange: str, request: bytes) -> bytes | None:
    """Return the reply that this very request has had in this exchange; None: it is new."""
    for each in state.rounds:
        for answered in each.answered:
            if (answered.exchange, answered.request) == (exchange, request):
                return answered.reply
    return None


def _check_turn(current: SiteRound, exchange: str) -> None:
    """Accept a new request of an exchange whose turn it is.

    Raises:
        ProtocolError: the exchange is over, or comes later.
    """
    number, done = current.terms.number, len(current.answered)
    if exchange in EXCHANGES[:done]:
        raise ProtocolError(
            f"round {number}: this site has answered another request to {exchange}, and answers one"
        )
    if EXCHANGES[done] != exchange:
        raise ProtocolError(f"round {number}: {EXCHANGES[done]} comes before {exchange}")


def _answer(
    state: SiteState, changed: SiteRound, exchange: str, request: bytes, reply: bytes
) -> Answer:
    """Return the state in which an exchange of this round is over."""
    answered = (*changed.answered, Answered(exchange, request, reply))
    return Answer(state.with_round(replace(changed, answered=answered)), reply)


def _check_new_round(state: SiteState, terms: RoundTerms) -> None:
    """Accept the terms of a round that is new, among sites that are known."""
    if terms.run != state.run:
        raise ProtocolError(f"the terms are of run '{terms.run}', not of '{state.run}'")
    last = max((each.terms.number for each in state.rounds), default=-1)
    if terms.number <= last:
        raise ProtocolError(
            f"round {terms.number} is not after round {last}, which this site has prepared"
        )
    for peer in terms.cohort:
        if peer != state.site and peer not in state.channels:
            raise ProtocolError(f"site {fingerprint(peer)} has not announced itself here", peer)


def _members(current: SiteRound) -> tuple[int, ...]:
    return positions_from(current.members, len(current.terms.cohort))


def _checked_survivors(current: SiteRound, survivors: bytes, own: int) -> tuple[int, ...]:
    """Return the positions of the survivors."""
    positions, number = positions_from(survivors, len(current.terms.cohort)), current.terms.number
    if not set(positions) <= set(_members(current)):
        raise ProtocolError(f"round {number}: a survivor is named that had not prepared")
    if current.survivors and survivors != current.survivors:
        raise ProtocolError(
            f"round {number}: other survivors are named than this site has confirmed; it reveals "
            "one half of each secret, never both"
        )
    _check_enough(current.terms, positions, own, "survived")
    return positions


def _check_agreement(
    state: SiteState, current: SiteRound, message: UnmaskRequest, own: int
) -> None:
    """Accept survivors that enough sites, this one included, were told alike. A tag that its site
    has not made for them counts for nothing, and against nobody: one liar ends no round.

    Raises:
        ProtocolError: tags of others than the survivors, or not one for each.
        BelowThreshold: too few tags that hold.
    """
    terms = current.terms
    sites = len(terms.cohort)
    confirmers = positions_from(message.confirmers, sites)
    if own in confirmers or not set(confirmers) <= set(positions_from(message.survivors, sites)):
        raise ProtocolError(f"round {terms.number}: a site confirms that is no other survivor")
    if len(confirmers) != len(message.tags):
        raise ProtocolError("an unmask request has not one tag for each site that confirms")
    told = 1
    for position, tag in zip(confirmers, message.tags, strict=True):
        channel = state.channel(terms.cohort[position])
        expected = keys.agreement_tag(channel, terms.context, position, own, message.survivors)
        told += compare_digest(tag, expected)
    terms.require_enough(told, "were told the same survivors", terms.threshold)


def _opened(
    state: SiteState, request: bytes
) -> tuple[SiteRound, Mapping[int, bytes], Mapping[int, bytes]]:
    """Return the round of a request to mask, with its members; the key of the mask with each of the
    others, and the shares of all, by position.

    Raises:
        ProtocolError: as :func:`require_maskable`.
    """
    message = MaskRequest.from_bytes(request)
    current = state.round_of(message.context)
    _check_turn(current, "mask")
    terms, own = current.terms, current.terms.position(state.site)
    members = positions_from(message.members, len(terms.cohort))
    _check_enough(terms, members, own, "prepared")
    peers = [position for position in members if position != own]
    if not len(peers) == len(message.mask_keys) == len(message.encrypted_shares):
        raise ProtocolError("a mask request has not one key and the shares of each member")
    private = keys.mask_private_key(current.mask_seed, terms.context)
    pairs, shares = dict[int, bytes](), {own: current.own_shares}
    received = zip(peers, message.mask_keys, message.encrypted_shares, strict=True)
    for position, key, encrypted in received:
        peer = terms.cohort[position]
        try:
            channel = state.channel(peer)
            shares[position] = keys.decrypt_shares(
                channel, terms.context, position, own, key, encrypted
            )
            pairs[position] = keys.pair_mask_key(private, key, terms.context, own, position)
        except ProtocolError as error:
            raise ProtocolError(f"site {fingerprint(peer)}: {error}", peer) from None
    return replace(current, members=message.members), pairs, shares


def _check_enough(terms: RoundTerms, positions: tuple[int, ...], own: int, what: str) -> None:
    if own not in positions:
        raise ProtocolError(f"round {terms.number}: this site is not among those who {what}")
    terms.require_enough(len(positions), what, terms.least)
