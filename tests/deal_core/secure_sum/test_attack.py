"""What the server sees of one site tells nothing of its vector: by attack, and by the bytes."""

import numpy as np
import pytest
from scipy.stats import chisquare

from deal_core.secure_sum import keys as masks
from deal_core.secure_sum import site_round
from deal_core.secure_sum.messages import (
    ConfirmRequest,
    Masked,
    ProtocolError,
    UnmaskRequest,
    positions_bytes,
)
from deal_core.secure_sum.terms import SitePolicy
from tests.deal_core.secure_sum.attack import (
    LARGEST,
    TARGET,
    UNKNOWN_BITS,
    WORDS,
    attacked,
    colluding_seed,
    residual,
    revealed_seeds,
    search,
    weak_key,
    weak_number,
)
from tests.deal_core.secure_sum.rounds import Round, first, integers, met, terms_of, vectors
from tests.slow import slow_but

PATTERNS = {
    "nobody": (4, {}, 3),
    "before preparing": (4, {"prepare": [3]}, 2),
    "before masking": (4, {"mask": [3]}, 2),
    "after masking": (4, {"confirm": [3]}, 3),
    "in unmasking": (4, {"unmask": [3]}, 3),
    "the target, after masking": (4, {"confirm": [TARGET]}, 3),
    "the target, in unmasking": (4, {"unmask": [TARGET]}, 3),
    "the target, whose vector comes late": (4, {"mask": [TARGET]}, 1),
    "two, before masking": (5, {"mask": [3, 4]}, 2),
    "two, before preparing and before masking": (5, {"prepare": [4], "mask": [3]}, 2),
    "two, before and after masking": (5, {"mask": [4], "confirm": [3]}, 3),
    "two, after masking": (5, {"confirm": [3], "unmask": [4]}, 4),
    "another and the target, whose vector comes late": (5, {"mask": [TARGET, 4]}, 1),
}
"""Who drops out -> sites, who is gone in which exchange, how many masks of the target remain."""
NAMES = slow_but(
    PATTERNS,
    "nobody",
    "before masking",
    "after masking",
    "the target, in unmasking",
    "the target, whose vector comes late",
    "two, before and after masking",
)


@pytest.fixture
def weak(monkeypatch):
    """Masks from seeds of few bits, as of a generator that is seeded by a small number."""

    def seed_with(bits):
        good = masks.mask_stream
        monkeypatch.setattr(
            masks, "mask_stream", lambda key: good(weak_key(weak_number(key, bits)))
        )

    return seed_with


@pytest.mark.parametrize("name", NAMES)
def test_all_that_the_server_sees_does_not_give_a_vector(name):
    sites, absent, unknown = PATTERNS[name]
    round_ = attacked(absent, sites=sites)
    words, left = residual(round_, TARGET)
    assert len(left) == unknown
    assert search(words, left, LARGEST) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_same_attack_succeeds_where_masks_come_from_short_seeds(name, weak):
    sites, absent, unknown = PATTERNS[name]
    weak(UNKNOWN_BITS // unknown)
    round_ = attacked(absent, sites=sites)
    words, left = residual(round_, TARGET)
    found = search(words, left, LARGEST)
    assert found is not None
    own = round_.encoded[round_.terms.cohort[TARGET]].words
    assert np.array_equal(found, own[:WORDS])


def test_a_colluding_site_takes_its_own_mask_away_and_no_other(weak):
    round_ = attacked({}, sites=5, colluding=1)
    words, left = residual(round_, TARGET, {3: colluding_seed(round_, 3)})
    assert len(left) == 3
    assert search(words, left, LARGEST) is None
    weak(UNKNOWN_BITS // 3)
    round_ = attacked({}, sites=5, colluding=1)
    told = {3: colluding_seed(round_, 3)}
    assert search(*residual(round_, TARGET, told), LARGEST) is not None


def test_all_others_together_know_the_vector_as_they_know_the_sum():
    # The attack takes masks away rightly: where nothing is left to be hidden, it finds the vector.
    round_ = attacked({})
    words, left = residual(round_, TARGET, {at: colluding_seed(round_, at) for at in (0, 2, 3)})
    assert left == []
    assert np.array_equal(words, round_.encoded[round_.terms.cohort[TARGET]].words)


def test_a_revealed_key_opens_no_other_round():
    """The target drops out of round 2, and its mask seed is revealed: round 1 stays closed."""
    one, two = attacked({}), attacked({"mask": [TARGET]}, number=2)
    revealed = revealed_seeds(two)[1]
    assert revealed == {TARGET: colluding_seed(two, TARGET)}
    words, left = residual(one, TARGET, revealed)
    assert left == []
    assert search(words, left, LARGEST) is None
    # The seed of round 1 itself would have opened it.
    words, left = residual(one, TARGET, {TARGET: colluding_seed(one, TARGET)})
    assert search(words, left, LARGEST) is not None


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_a_masked_vector_are_uniform_also_with_known_masks_taken_away(name, bits):
    sites, absent, _ = PATTERNS[name]
    round_ = attacked(absent, length=1 << 15, seed=4, sites=sites, bits=bits)
    site = round_.terms.cohort[TARGET]
    sent = np.frombuffer(Masked.from_bytes(round_.received["mask", site]).words, np.uint8)
    words, _ = residual(round_, TARGET)
    for data in (sent, words.view(np.uint8)):
        # As a whole, and each byte of a word by itself: the upper ones of plain words are 0 or 255.
        for part in (data, *data.reshape(-1, bits // 8).T):
            assert uniform(part) > 1e-4
    plain = round_.encoded[site].words.view(np.uint8)
    assert uniform(plain) < 1e-12


def test_what_else_the_server_holds_of_a_site_is_uniform():
    """Boxes, tags, keys and commitments; shares that were revealed; of many rounds."""
    data = {exchange: bytearray() for exchange in ("prepare", "confirm", "unmask")}
    for number in range(1, 75):
        round_ = attacked({"mask": [3]}, number=number, seed=number)
        for exchange, held in data.items():
            reply = round_.received[exchange, round_.terms.cohort[TARGET]]
            bodies = {"prepare": -(32 + 4 + 32 + 4 + 3 * 48), "confirm": -2 * 16, "unmask": -4 * 16}
            held += reply[bodies[exchange] :]
    prepared = np.frombuffer(bytes(data.pop("prepare")), np.uint8).reshape(-1, 216)
    drawn = np.delete(prepared, [31, 32, 33, 34, 35, 68, 69, 70, 71], axis=1)
    # X25519 keys are below 2^255 - 19: all bytes but the last are as good as uniform.
    assert uniform(drawn.ravel()) > 1e-4
    for held in data.values():
        assert uniform(np.frombuffer(bytes(held), np.uint8)) > 1e-4


def uniform(data):
    """The p-value of chi-squared over the 256 values of a byte."""
    return float(chisquare(np.bincount(data, minlength=256)).pvalue)


def different_views(round_):
    """Tell each site other survivors, so that six of ten mask seeds come together.

    Every site loses four peers, which the threshold of six allows; each of the sites 0 to 5 is
    called dropped at six sites or more.
    """
    counts = dict.fromkeys(range(6), 0)
    for own, site in enumerate(round_.terms.cohort):
        fewest = sorted((at for at in counts if at != own), key=lambda at: counts[at])[:4]
        counts.update({at: counts[at] + 1 for at in fewest})
        survivors = positions_bytes(at for at in range(10) if at not in fewest)
        request = ConfirmRequest(round_.terms.context, survivors).to_bytes()
        round_.reply("confirm", site, request)
        request = UnmaskRequest(round_.terms.context, survivors, b"", ()).to_bytes()
        round_.reply("unmask", site, request)
    assert min(counts.values()) >= 6


@pytest.fixture
def ten_sites():
    states = first(met(10), 10)
    layout = integers(WORDS, 10, largest=LARGEST)
    terms = terms_of(states, layout, min_cohort=6)
    policy = SitePolicy(min_cohort=6)
    return Round(terms, states, vectors(states, layout), policy=policy).until("confirm")


def test_without_agreement_a_lying_server_gets_the_sum_of_fewer_than_the_threshold(
    ten_sites, monkeypatch
):
    """Why survivors agree: no single vector comes out, but the sum of four where six were asked."""
    monkeypatch.setattr(site_round, "_check_agreement", lambda *given: None)
    round_ = ten_sites
    different_views(round_)
    few = [6, 7, 8, 9]
    total = np.zeros(WORDS, "<u4")
    for target in few:
        words, left = residual(round_, target)
        # Only the masks among the four are left, and they cancel in their sum.
        assert len(left) == len(few) - 1
        assert search(words, left, LARGEST) is None
        total += words
    sites = [round_.terms.cohort[at] for at in few]
    assert np.array_equal(total, sum(round_.encoded[site].words for site in sites))


def test_with_agreement_the_same_server_gets_nothing(ten_sites):
    with pytest.raises(ProtocolError, match="1 of 10 sites were told the same survivors"):
        different_views(ten_sites)
    assert not any(exchange == "unmask" for exchange, _ in ten_sites.received)
