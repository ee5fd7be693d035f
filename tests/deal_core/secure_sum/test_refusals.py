"""What a server asks that it must not: each has its own line, and nothing is revealed."""

from dataclasses import replace

import numpy as np
import pytest

from deal_core.secure_sum import server_round, site_round
from deal_core.secure_sum.layout import Encoded
from deal_core.secure_sum.messages import (
    BelowThreshold,
    Confirmed,
    ConfirmRequest,
    MaskRequest,
    ProtocolError,
    Unmasked,
    UnmaskRequest,
    positions_bytes,
    positions_from,
)
from deal_core.secure_sum.server_round import open_round, unmasked_sum
from deal_core.secure_sum.terms import RoundTerms, SitePolicy
from tests.deal_core.secure_sum.rounds import (
    Round,
    first,
    integers,
    met,
    plain_sum,
    terms_of,
    vectors,
)

SITES = 5
LAYOUT = integers(4, SITES)


def a_round(number=1, states=None, seed=0, **changed):
    states = states or first(met(SITES), SITES)
    terms = terms_of(states, LAYOUT, number, **changed)
    return Round(terms, states, vectors(states, LAYOUT), seed=seed)


def refused(exchange, state, request, line, *rest):
    """The request is refused; the state is what it was, so nothing has left."""
    before = state.to_bytes()
    with pytest.raises(ProtocolError, match=line):
        getattr(site_round, exchange)(state, request, *rest)
    assert state.to_bytes() == before


def goes_on(round_, exchange):
    """After all refusals the round ends as it should."""
    exchanges = ["prepare", "mask", "confirm", "unmask"]
    for name in exchanges[exchanges.index(exchange) :]:
        getattr(round_, name)()
    assert np.array_equal(unmasked_sum(round_.held), plain_sum(round_.encoded, round_.terms.cohort))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"cohort": 2}, "a cohort of 2 sites is below this site's min_cohort = 3"),
        ({"min_cohort": 2}, "would sum 2 sites, this site's policy asks for min_cohort = 3"),
        ({"colluding": 0}, "reckons with 0 colluding sites, this site's policy with 1"),
        ({"run": "run-2"}, "of run 'run-2', not of 'run-1'"),
        ({"number": 0, "length": 5}, "round 0 is not after round 0"),
        ({"colluding": 4}, "leave no two honest ones"),
        ({"min_cohort": 6}, "not between 2 and the cohort of 5"),
        ({"bits": 16}, "a ring of 16 bits is unknown"),
        ({"length": 0}, "empty or too long"),
        ({"layout": b""}, "digest of a layout has 32 bytes"),
        ({"cohort": "twice"}, "names a site twice"),
        ({"cohort": "without"}, "not in the cohort"),
        ({"cohort": "stranger"}, "has not announced itself here"),
        ({"cohort": 1}, "a sum of one site"),
    ],
)
def test_terms_that_a_site_does_not_take(changed, line):
    round_ = a_round(0, colluding=1, min_cohort=3)
    round_.policy = SitePolicy(min_cohort=3, colluding=1)
    round_.prepare()
    state = next(iter(round_.states.values()))
    cohort = list(round_.terms.cohort)
    cohorts = {
        1: cohort[:1], 2: cohort[:2], "twice": [*cohort, cohort[-1]], "without": cohort[1:],
        "stranger": [*cohort[:-1], bytes([255]) * 32],
    }  # fmt: skip
    if "cohort" in changed:
        few = isinstance(changed["cohort"], int)
        changed = {"cohort": tuple(cohorts[changed["cohort"]])}
        changed |= {"min_cohort": 2, "colluding": 0} if few else {}
    terms = replace(round_.terms, **{"number": 1, **changed})
    refused("prepare", state, terms.to_bytes(), line, round_.policy)


def test_a_round_is_prepared_once():
    round_ = a_round(3)
    round_.prepare()
    site = round_.terms.cohort[0]
    other = replace(round_.terms, colluding=1).to_bytes()
    refused("prepare", round_.states[site], other, "round 3 is not after round 3", round_.policy)
    old = replace(round_.terms, number=2).to_bytes()
    refused("prepare", round_.states[site], old, "round 2 is not after round 3", round_.policy)
    goes_on(round_, "mask")


def spoilt_mask_requests(round_, earlier, site):
    """Requests with something exchanged, and how each is refused."""
    good = MaskRequest.from_bytes(server_round.mask_request(round_.held, site))
    old = MaskRequest.from_bytes(server_round.mask_request(earlier.held, site))
    other = MaskRequest.from_bytes(server_round.mask_request(round_.held, round_.terms.cohort[1]))
    shares, keys = good.encrypted_shares, good.mask_keys
    changes = [
        ({"encrypted_shares": (old.encrypted_shares[0], *shares[1:])}, "do not open"),
        ({"mask_keys": old.mask_keys, "encrypted_shares": old.encrypted_shares}, "do not open"),
        ({"encrypted_shares": shares[::-1]}, "do not open"),
        ({"encrypted_shares": other.encrypted_shares}, "do not open"),
        ({"mask_keys": (old.mask_keys[0], *keys[1:])}, "do not open"),
        ({"mask_keys": (bytes(32), *keys[1:])}, "do not open"),
        ({"members": positions_bytes([1, 2, 3, 4])}, "not among those who prepared"),
        ({"members": positions_bytes([0, 1])}, "2 of 5 sites prepared, below the 3"),
        ({"members": positions_bytes([0, 7])}, "not in the cohort"),
        ({"encrypted_shares": shares[:-1]}, "one key and the shares of each member"),
        ({"context": bytes(32)}, "prepared no round with these terms"),
    ]
    return [(replace(good, **changed).to_bytes(), line) for changed, line in changes]


def test_replayed_shares_shares_of_another_round_and_exchanged_mask_keys():
    earlier = a_round(1)
    earlier.prepare()
    round_ = a_round(2, earlier.states)
    round_.prepare()
    site = round_.terms.cohort[0]
    for request, line in spoilt_mask_requests(round_, earlier, site):
        refused("mask", round_.states[site], request, line, round_.encoded[site])
    goes_on(round_, "mask")


def test_a_site_to_blame_is_named():
    round_ = a_round()
    round_.prepare()
    site, blamed = round_.terms.cohort[0], round_.terms.cohort[2]
    good = MaskRequest.from_bytes(server_round.mask_request(round_.held, site))
    encrypted = (good.encrypted_shares[0], bytes(48), *good.encrypted_shares[2:])
    with pytest.raises(ProtocolError) as refusal:
        site_round.mask(
            round_.states[site],
            replace(good, encrypted_shares=encrypted).to_bytes(),
            round_.encoded[site],
        )
    assert refusal.value.site == blamed


def test_another_vector_than_was_agreed():
    round_ = a_round()
    round_.prepare()
    site = round_.terms.cohort[0]
    request = server_round.mask_request(round_.held, site)
    good = round_.encoded[site]
    for encoded, line in [
        (replace(good, layout=bytes(32)), "laid out otherwise"),
        (replace(good, sites=SITES - 1), "laid out otherwise"),
        (replace(good, words=good.words[1:]), "length or the ring"),
        (Encoded(good.layout, good.sites, good.words.astype("<u8")), "length or the ring"),
    ]:
        refused("mask", round_.states[site], request, line, encoded)
    goes_on(round_, "mask")


def test_both_halves_are_never_given():
    round_ = a_round().until("unmask")
    site, victim = round_.terms.cohort[:2]
    state = round_.states[site]
    good = UnmaskRequest.from_bytes(server_round.unmask_request(round_.held, site))
    without = positions_bytes([0, 2, 3, 4])
    # Before it has answered: other survivors than it has confirmed.
    dropped = replace(good, survivors=without, confirmers=positions_bytes([2, 3, 4]))
    request = replace(dropped, tags=good.tags[1:]).to_bytes()
    refused("unmask", state, request, "one half of each secret, never both")
    round_.unmask()
    # After it has answered: nothing but the same again.
    refused("unmask", round_.states[site], request, "answered another request to unmask")
    other = ConfirmRequest(good.context, without).to_bytes()
    refused("confirm", round_.states[site], other, "answered another request to confirm")
    answers = [Unmasked.from_bytes(round_.received["unmask", each]) for each in round_.terms.cohort]
    place = round_.terms.cohort.index(victim)
    assert len({answer.shares[place] for answer in answers}) == SITES
    assert round_.states[site].rounds[-1].shares == ()


def test_survivors_that_a_site_does_not_believe():
    round_ = a_round()
    round_.absent = {"prepare": [4]}
    round_.until("confirm")
    site = round_.terms.cohort[0]
    for survivors, line in [
        ([0, 1, 2, 4], "a survivor is named that had not prepared"),
        ([1, 2, 3], "not among those who survived"),
        ([0, 1], "2 of 5 sites survived, below the 3"),
        ([0, 1, 2, 9], "not in the cohort"),
    ]:
        request = ConfirmRequest(round_.terms.context, positions_bytes(survivors)).to_bytes()
        refused("confirm", round_.states[site], request, line)
    round_.confirm()
    round_.unmask()
    assert np.array_equal(
        unmasked_sum(round_.held), plain_sum(round_.encoded, round_.terms.cohort[:4])
    )


def test_tags_that_do_not_fit():
    round_ = a_round().until("unmask")
    site = round_.terms.cohort[0]
    good = UnmaskRequest.from_bytes(server_round.unmask_request(round_.held, site))
    for request, line in [
        (replace(good, tags=good.tags[::-1]), "1 of 5 sites were told the same"),
        (replace(good, tags=(bytes(16),) * 3 + good.tags[3:]), "2 of 5 sites were"),
        (replace(good, tags=good.tags[:-1]), "one tag for each site"),
        (
            replace(good, confirmers=positions_bytes([1]), tags=good.tags[:1]),
            "2 of 5 sites were told",
        ),
        (
            replace(good, confirmers=b"", tags=()),
            "1 of 5 sites were told the same",
        ),
        (replace(good, confirmers=positions_bytes([0, 1, 2, 3])), "confirms that is no other"),
    ]:
        refused("unmask", round_.states[site], request.to_bytes(), line)
    goes_on(round_, "unmask")


def test_a_false_tag_of_one_site_ends_no_round():
    """Its silence would not either."""
    round_ = a_round().until("unmask")
    liar, reply = round_.terms.cohort[1], server_round.unmask_request
    false = {}
    for site in round_.terms.cohort:
        good = UnmaskRequest.from_bytes(reply(round_.held, site))
        if site != liar:
            place = positions_from(good.confirmers, SITES).index(1)
            tags = (*good.tags[:place], bytes(16), *good.tags[place + 1 :])
            good = replace(good, tags=tags)
        false[site] = site_round.unmask(round_.states[site], good.to_bytes()).reply
    held = round_.held
    for site, answered in false.items():
        held = server_round.add_unmasked(held, site, answered)
    assert np.array_equal(unmasked_sum(held), plain_sum(round_.encoded, round_.terms.cohort))


@pytest.mark.parametrize(
    ("done", "asked", "line"),
    [
        ("prepare", "mask", "prepared no round"),
        ("mask", "confirm", "mask comes before confirm"),
        ("mask", "unmask", "mask comes before unmask"),
        ("confirm", "unmask", "confirm comes before unmask"),
        ("end", "mask", "answered another request to mask"),
    ],
)
def test_exchanges_out_of_turn(done, asked, line):
    whole = a_round()
    whole.total()
    round_ = a_round(seed=1).until(done)
    site = round_.terms.cohort[0]
    rest = (round_.encoded[site],) if asked == "mask" else ()
    refused(asked, round_.states[site], whole.sent[asked, site], line, *rest)


def test_a_server_refuses_replies_that_do_not_fit():
    round_ = a_round()
    round_.absent = {"mask": [4]}
    other = a_round(2, first(met(SITES), SITES))
    round_.until("unmask"), other.until("unmask")
    site, late = round_.terms.cohort[0], round_.terms.cohort[4]
    held = round_.held
    tags = Confirmed.from_bytes(round_.received["confirm", site])
    for add, reply, who, line in [
        ("add_prepared", other.received["prepare", site], site, "of another round"),
        ("add_masked", other.received["mask", site], site, "of another round"),
        ("add_confirmed", other.received["confirm", site], site, "of another round"),
        ("add_prepared", round_.received["prepare", late], site, "replied twice, and differently"),
        ("add_masked", other.received["mask", late], late, "of another round"),
        ("add_confirmed", replace(tags, tags=tags.tags[1:]).to_bytes(), site, "wrong length"),
        ("add_confirmed", replace(tags, tags=tags.tags[::-1]).to_bytes(), site, "differently"),
        ("add_confirmed", tags.to_bytes(), late, "out of this exchange"),
        ("add_unmasked", Unmasked(held.terms.context, ()).to_bytes(), site, "wrong length"),
        ("add_masked", b"", site, "of this version"),
    ]:
        with pytest.raises(ProtocolError, match=line):
            getattr(server_round, add)(held, who, reply)
    with pytest.raises(ProtocolError, match="out of this exchange"):
        server_round.mask_request(open_round(round_.terms), site)
    with pytest.raises(ProtocolError, match="not in the cohort"):
        server_round.add_masked(held, bytes(32), b"")
    round_.reply("mask", late, server_round.mask_request(held, late))
    with pytest.raises(ProtocolError, match="came too late"):
        server_round.add_masked(held, late, round_.received["mask", late])


def test_a_false_share_is_noticed_and_costs_the_round_only_where_no_answer_is_spare():
    round_ = a_round().until("end")
    liar = round_.held.unmasked[1]
    lie = replace(liar, shares=tuple(bytes(16) for _ in liar.shares))
    spoilt = replace(round_.held, unmasked={**round_.held.unmasked, 1: lie})
    assert np.array_equal(unmasked_sum(spoilt), plain_sum(round_.encoded, round_.terms.cohort))
    few = {at: spoilt.unmasked[at] for at in (0, 1, 2)}
    with pytest.raises(ProtocolError, match="do not give the secret it has committed to"):
        unmasked_sum(replace(spoilt, unmasked=few))
    with pytest.raises(BelowThreshold, match="2 of 5 sites revealed"):
        unmasked_sum(replace(spoilt, unmasked={at: few[at] for at in (0, 2)}))


def test_terms_have_one_form():
    terms = a_round().terms
    assert RoundTerms.from_bytes(terms.to_bytes()) == terms
    with pytest.raises(ProtocolError, match="one form"):
        RoundTerms.from_bytes(terms.to_bytes().replace(b"run-1", b"run-\xff"))
