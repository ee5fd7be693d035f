"""The end of a round at the server: secrets put together, masks taken away, the sum alone left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deal_core.secure_sum.identity import fingerprint
from deal_core.secure_sum.keys import public_half
from deal_core.secure_sum.masks import Words, add_masks
from deal_core.secure_sum.protocol_error import BelowThreshold, ProtocolError
from deal_core.secure_sum.round_keys import (
    commitment,
    mask_private_key,
    pair_mask_key,
    self_mask_key,
)
from deal_core.secure_sum.server_round import ServerRound
from deal_core.secure_sum.shamir import combine, combining_weights


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


def _check_secret(held: ServerRound, member: int, fits: bool) -> None:
    if not fits:
        site = held.terms.cohort[member]
        raise ProtocolError(
            f"round {held.terms.number}: the shares of site {fingerprint(site)} do not give the "
            "secret it has committed to: the round ends without a sum",
            site,
        )
