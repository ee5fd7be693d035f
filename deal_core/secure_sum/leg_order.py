"""Each leg of a round once, in its order: the same request has the same reply, another has none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.site_state import Answered, SiteRound, SiteState
from deal_core.secure_sum.terms import RoundTerms


@dataclass(frozen=True)
class Answer:
    """The state to keep, and then the reply to send."""

    state: SiteState
    reply: bytes


def legs_of(terms: RoundTerms) -> tuple[str, ...]:
    """Return the legs of a round in their order."""
    agreement = ("confirm",) if terms.confirm else ()
    return ("prepare", "mask", *agreement, "unmask")


def stored_reply(state: SiteState, leg: str, request: bytes) -> bytes | None:
    """Return the reply that this very request has had in this leg; None: it is new."""
    for each in state.rounds:
        for answered in each.answered:
            if (answered.leg, answered.request) == (leg, request):
                return answered.reply
    return None


def check_turn(current: SiteRound, leg: str) -> None:
    """Accept a new request of a leg whose turn it is.

    Raises:
        ProtocolError: the leg is over, comes later, or is not of this round.
    """
    legs, done = legs_of(current.terms), [each.leg for each in current.answered]
    number = current.terms.number
    if leg in done:
        raise ProtocolError(
            f"round {number}: this site has answered another request to {leg}, and answers one"
        )
    if leg not in legs:
        raise ProtocolError(f"round {number}: its terms do without the leg {leg}")
    if legs[len(done)] != leg:
        raise ProtocolError(f"round {number}: {legs[len(done)]} comes before {leg}")


def answer(state: SiteState, changed: SiteRound, leg: str, request: bytes, reply: bytes) -> Answer:
    """Return the state in which a leg of this round is over."""
    answered = (*changed.answered, Answered(leg, request, reply))
    return Answer(state.with_round(replace(changed, answered=answered)), reply)
