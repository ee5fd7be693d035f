"""What a site looks at in the requests of a round before it does anything."""

from __future__ import annotations

from deal_core.secure_sum.agreement import agreement_tag, same_tag
from deal_core.secure_sum.frames import positions_from
from deal_core.secure_sum.identity import fingerprint
from deal_core.secure_sum.layout import Encoded
from deal_core.secure_sum.messages import UnmaskRequest
from deal_core.secure_sum.protocol_error import BelowThreshold, ProtocolError
from deal_core.secure_sum.site_state import SiteRound, SiteState
from deal_core.secure_sum.terms import RoundTerms


def check_new_round(state: SiteState, terms: RoundTerms) -> None:
    """Accept the terms of a round that is new, among sites that are known.

    Raises:
        ProtocolError: another run, a round that is past, a site without a channel.
    """
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


def check_members(current: SiteRound, members: bytes, own: int) -> tuple[int, ...]:
    """Return the positions of all who prepared.

    Raises:
        ProtocolError: this site is not among them.
        BelowThreshold: they are too few.
    """
    positions = positions_from(members, len(current.terms.cohort))
    _check_enough(current, positions, own, "prepared")
    return positions


def check_encoded(terms: RoundTerms, encoded: Encoded) -> None:
    """Accept a vector that is laid out as was agreed.

    Raises:
        ProtocolError: it is not.
    """
    if encoded.layout != terms.layout or encoded.sites < len(terms.cohort):
        raise ProtocolError("the vector is laid out otherwise than the round's terms say")
    if len(encoded.words) != terms.length or encoded.words.dtype.itemsize * 8 != terms.bits:
        raise ProtocolError("the vector has not the length or the ring of the round's terms")


def check_survivors(current: SiteRound, survivors: bytes, own: int) -> tuple[int, ...]:
    """Return the positions of the survivors.

    Raises:
        ProtocolError: one had not prepared, this site is not among them, or they are others than
            this site has confirmed.
        BelowThreshold: they are too few.
    """
    sites = len(current.terms.cohort)
    positions = positions_from(survivors, sites)
    number = current.terms.number
    if not set(positions) <= set(positions_from(current.members, sites)):
        raise ProtocolError(f"round {number}: a survivor is named that had not prepared")
    if current.survivors and survivors != current.survivors:
        raise ProtocolError(
            f"round {number}: other survivors are named than this site has confirmed; it reveals "
            "one half of each secret, never both"
        )
    _check_enough(current, positions, own, "survived")
    return positions


def check_agreement(state: SiteState, current: SiteRound, message: UnmaskRequest, own: int) -> None:
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
        expected = agreement_tag(channel, terms.context, position, own, message.survivors)
        told += same_tag(tag, expected)
    if told < terms.threshold:
        raise BelowThreshold(
            f"round {terms.number}: {told} sites were told the same survivors, "
            f"below the {terms.threshold} that a sum needs"
        )


def _check_enough(current: SiteRound, positions: tuple[int, ...], own: int, what: str) -> None:
    terms = current.terms
    if own not in positions:
        raise ProtocolError(f"round {terms.number}: this site is not among those who {what}")
    if len(positions) < terms.least:
        raise BelowThreshold(
            f"round {terms.number}: {len(positions)} of {len(terms.cohort)} sites {what}, "
            f"below the {terms.least} that a sum needs"
        )
