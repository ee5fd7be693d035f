"""Sites and server that start again in any exchange: the same bytes for the same request."""

import numpy as np
import pytest

from deal_core.secure_sum import server_round, site_round
from deal_core.secure_sum.messages import ProtocolError, UsedUpdate
from deal_core.secure_sum.server_round import ServerRound, unmasked_sum
from deal_core.secure_sum.site_round import stored_reply
from deal_core.secure_sum.site_state import SiteState, UsedUpdates
from deal_core.secure_sum.terms import SitePolicy
from tests.deal_core.secure_sum.rounds import (
    DONE,
    EXCHANGES,
    Round,
    first,
    integers,
    met,
    plain_sum,
    terms_of,
    vectors,
)


@pytest.fixture
def finished():
    states = first(met(5), 5)
    layout = integers(4, 5)
    round_ = Round(terms_of(states, layout), states, vectors(states, layout), {"mask": [2]})
    round_.total()
    return round_


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_same_request_gets_the_same_bytes_after_a_restart(finished, exchange):
    other = vectors(finished.states, integers(4, 5), seed=9)
    for site in finished.terms.cohort:
        if (exchange, site) not in finished.sent:
            continue
        request = finished.sent[exchange, site]
        state = SiteState.from_bytes(finished.states[site].to_bytes())
        if exchange == "prepare":
            answer = site_round.prepare(state, request, SitePolicy(2))
        elif exchange == "mask":
            # Trained anew after the restart: another vector, and still the first reply.
            answer = site_round.mask(state, request, other[site])
        else:
            answer = getattr(site_round, exchange)(state, request)
        assert (
            answer.reply
            == finished.received[exchange, site]
            == stored_reply(state, exchange, request)
        )
        assert answer.state == state


def test_of_a_new_request_nothing_is_stored(finished):
    state = next(iter(finished.states.values()))
    assert stored_reply(state, "prepare", b"another") is None


@pytest.mark.parametrize("exchange", EXCHANGES[1:])
def test_what_another_exchange_has_answered_is_not_to_be_had_from_the_first(finished, exchange):
    """It would leave past what the site asks of a round today."""
    site = finished.terms.cohort[0]
    with pytest.raises(ProtocolError):
        site_round.prepare(finished.states[site], finished.sent[exchange, site], SitePolicy(2))


def test_terms_that_were_answered_are_answered_under_the_policy_of_today(finished):
    site = finished.terms.cohort[0]
    with pytest.raises(ProtocolError, match="6"):
        site_round.prepare(finished.states[site], finished.sent["prepare", site], SitePolicy(6))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_server_that_starts_again_takes_the_same_replies_again(finished, exchange):
    """Killed before it stored what came in an exchange: it asks again, and the sum is the same."""
    states = first(met(5), 5)
    again = Round(finished.terms, states, finished.encoded, {"mask": [2]}).until(exchange)
    again.states = finished.states
    again.gone = set()
    for name in EXCHANGES[EXCHANGES.index(exchange) :]:
        getattr(again, name)()
    sites = [site for at, site in enumerate(finished.terms.cohort) if at != 2]
    assert np.array_equal(unmasked_sum(again.held), plain_sum(finished.encoded, sites))


def test_a_reply_that_comes_twice_counts_once(finished):
    held = finished.held
    for (exchange, site), reply in finished.received.items():
        held = getattr(server_round, f"add_{DONE[exchange]}")(held, site, reply)
    assert held.to_bytes() == finished.held.to_bytes()
    closed = server_round.close_masked(server_round.close_prepared(held))
    assert server_round.close_confirmed(closed).to_bytes() == held.to_bytes()


def test_secrets_are_gone_when_they_are_no_longer_needed(finished):
    for state in finished.states.values():
        record = state.rounds[-1]
        assert record.mask_seed == record.self_seed == b"" or len(record.answered) == 1
        if len(record.answered) == 4:
            assert record.shares == ()
    assert isinstance(ServerRound.from_bytes(finished.held.to_bytes()), ServerRound)


def test_two_rounds_are_kept_and_no_more():
    states = first(met(4), 3)
    layout = integers(2, 3)
    for number in range(4):
        round_ = Round(terms_of(states, layout, number), states, vectors(states, layout))
        round_.total()
        states = round_.states
    for state in states.values():
        assert [each.terms.number for each in state.rounds] == [2, 3]


ROUND, OTHER = b"r" * 32, b"s" * 32


def test_the_same_again_is_the_same():
    once = UsedUpdates().masking(ROUND, "learn 0 1", "update")
    assert once.masking(ROUND, "learn 0 1", "update") == once
    assert UsedUpdates.from_bytes(once.to_bytes()) == once
    assert UsedUpdates.from_bytes(UsedUpdates().to_bytes()) == UsedUpdates()


@pytest.mark.parametrize(
    ("context", "update"), [(OTHER, "update"), (ROUND, "another"), (OTHER, "another")]
)
def test_a_place_is_masked_once(context, update):
    """Neither for another round, nor with an update that differs by next to nothing."""
    once = UsedUpdates.from_bytes(UsedUpdates().masking(ROUND, "learn 0 1", "update").to_bytes())
    with pytest.raises(UsedUpdate, match="a second sum would tell the difference"):
        once.masking(context, "learn 0 1", update)
    assert once.masking(context, "learn 0 2", update).masked.keys() == {"learn 0 1", "learn 0 2"}
