"""What a server tries to learn of one site, with all that it has seen of a round."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from Crypto.Cipher import AES

from deal_core.secure_sum import server_round
from deal_core.secure_sum.keys import (
    Words,
    add_masks,
    mask_private_key,
    pair_mask_key,
    ring_type,
    self_mask_key,
)
from deal_core.secure_sum.messages import Masked, Prepared, Unmasked, UnmaskRequest, positions_from
from deal_core.secure_sum.shamir import combine, combining_weights
from tests.deal_core.secure_sum.rounds import (
    Absent,
    Round,
    first,
    integers,
    met,
    seeded_bytes,
    terms_of,
    vectors,
)

UNKNOWN_BITS = 16
"""Searched in all, 65,536 choices."""
TARGET, LARGEST = 1, 1000
WORDS = 8
"""First words of a stream: enough to tell a small number from a random one."""


def attacked(
    absent: Absent,
    length: int = WORDS,
    seed: int = 0,
    sites: int = 4,
    bits: int = 32,
    **changed: Any,
) -> Round:
    """A whole round; a target that was said to be gone sends its vector all the same."""
    states = first(met(5), sites)
    layout = integers(length, sites, bits, LARGEST)
    encoded = vectors(states, layout, seed)
    round_ = Round(terms_of(states, layout, **changed), states, encoded, absent, seed=seed)
    round_.total()
    site = round_.terms.cohort[TARGET]
    if ("mask", site) not in round_.received:
        round_.reply("mask", site, server_round.mask_request(round_.held, site))
    return round_


def weak_key(number: int) -> bytes:
    """A key of a weak generator: all of it comes from a small number."""
    return number.to_bytes(4, "little").ljust(32, b"\0")


def weak_number(key: bytes, bits: int) -> int:
    """The seed that a weak generator makes of a good key."""
    return int.from_bytes(key[:4], "little") % (1 << bits)


def revealed_seeds(round_: Round) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Put all shares together that sites have revealed, each as what it was asked for.

    Returns:
        Self seeds and mask seeds by position, where there are enough shares.
    """
    terms = round_.terms
    shares: dict[tuple[bool, int], dict[int, bytes]] = {}
    for (exchange, site), reply in round_.received.items():
        if exchange != "unmask":
            continue
        request = UnmaskRequest.from_bytes(round_.sent[exchange, site])
        survivors = positions_from(request.survivors, len(terms.cohort))
        members = round_.held.members or ()
        for member, share in zip(members, Unmasked.from_bytes(reply).shares, strict=True):
            held = shares.setdefault((member in survivors, member), {})
            held[terms.cohort.index(site) + 1] = share
    seeds: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
    for (survived, member), held in shares.items():
        if len(held) >= terms.threshold:
            some = dict(list(held.items())[: terms.threshold])
            seed = combine(combining_weights(list(some)), list(some.values()))
            seeds[0 if survived else 1][member] = seed
    return seeds


def residual(
    round_: Round, target: int, told: Mapping[int, bytes] | None = None
) -> tuple[Words, list[int]]:
    """Take every mask from a site's vector that the server knows.

    Args:
        round_: all that was sent and received.
        target: whose vector is attacked.
        told: mask seeds that it has from elsewhere, by position.

    Returns:
        The words that are left, and the sign of each mask that is still in them.
    """
    terms = round_.terms
    context, members = terms.context, round_.held.members or ()
    self_seeds, mask_seeds = revealed_seeds(round_)
    public = {
        at: Prepared.from_bytes(round_.received["prepare", terms.cohort[at]]).mask_key
        for at in members
    }
    mask_seeds = mask_seeds | dict(told or {})
    words = np.frombuffer(
        Masked.from_bytes(round_.received["mask", terms.cohort[target]]).words,
        ring_type(terms.bits),
    ).copy()
    left = []
    if target in self_seeds:
        add_masks(words, [], [self_mask_key(self_seeds[target], context)])
    else:
        left.append(1)
    for peer in members:
        if peer == target:
            continue
        sign = 1 if peer > target else -1
        known = {at: mask_seeds[at] for at in (target, peer) if at in mask_seeds}
        if not known:
            left.append(sign)
            continue
        own, seed = next(iter(known.items()))
        other = peer if own == target else target
        private = mask_private_key(seed, context)
        key = pair_mask_key(private, public[other], context, own, other)
        add_masks(words, [key] if sign < 0 else [], [key] if sign > 0 else [])
    return words, left


def colluding_seed(round_: Round, position: int) -> bytes:
    """A colluding site hands over its mask seed: here it draws it again from its seed."""
    site = round_.terms.cohort[position]
    return seeded_bytes(round_.seed, round_.terms.number, *site[:4])(16)


@functools.cache
def weak_streams(bits: int, itemsize: int) -> np.ndarray:
    """The first words of all streams whose seeds have so many bits, ``(streams, words)``."""
    plain = bytes(WORDS * itemsize)
    keys = (weak_key(number) for number in range(1 << bits))
    ciphers = (AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0) for key in keys)
    return np.stack([np.frombuffer(each.encrypt(plain), f"<u{itemsize}") for each in ciphers])


def search(words: Words, signs: Sequence[int], largest: int) -> Words | None:
    """Try all seeds of :data:`UNKNOWN_BITS` bits in all for the masks that are left.

    Returns:
        The first words of the vector, where exactly one choice leaves small numbers; or None.
    """
    if not signs:
        return words[:WORDS] if is_small(words[None, :WORDS], largest)[0] else None
    streams = weak_streams(UNKNOWN_BITS // len(signs), words.itemsize)
    rest = words[None, :WORDS]
    for sign in signs:
        masks = streams if sign > 0 else np.negative(streams)
        rest = (rest[:, None] - masks[None]).reshape(-1, WORDS)
    # Two masks of one sign in either order are one solution.
    found = np.unique(rest[is_small(rest, largest)], axis=0)
    return found[0] if len(found) == 1 else None


def is_small(rows: Words, largest: int) -> np.ndarray:
    """Whether all words of a row are numbers that a site may have sent."""
    signed = rows.view(f"<i{rows.itemsize}").astype(np.int64)
    return np.asarray(np.abs(signed).max(axis=1) <= largest)
