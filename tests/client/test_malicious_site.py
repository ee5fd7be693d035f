"""A site that bends its own messages of a secure sum, among honest ones: it costs a round, and not
the run."""

import base64
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord

from deal_core.privacy.ledger import Ledger
from deal_core.secure_sum.keys import Announcement, announce, encrypt_shares
from deal_core.secure_sum.layout import finest_scale
from deal_core.secure_sum.messages import Masked, Prepared
from deal_core.secure_sum.site_state import SiteState
from tests.client.secure.sites import OPEN, RUN, asked_for, grid_of, make_sites
from tests.simulations.run.secure_runs import client_of, exchange_of, rounds
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

EAST = 3
"""The malicious one."""
Bend = Callable[[bytes], bytes]
PRIVATE = (
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "train.step=server",
    "privacy.target_delta=1e-5",
    "privacy.metrics=none",
    "federation.rounds=5",
    "method.distillation.weight=0.0",
)
NOISED = (
    'mechanism = "record"\nnoise_share = "sum"\nmetrics = "none"\nmin_records = 1\n'
    'secure_aggregation = "required"\n'
)


@pytest.fixture
def sites(tmp_path):
    return make_sites(tmp_path)


def key_of(site):
    key = serialization.load_ssh_private_key(site.pair.private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def play(sites, path, exchange, bend, *overrides, last=2):
    """Rounds in which the messages of the malicious site in one exchange are bent; the last one is
    honest."""

    def see(reply):
        if exchange_of(reply) == exchange and client_of(reply) == str(EAST):
            data = reply.content["secure"]["reply"]
            reply.content["secure"] = ConfigRecord({"reply": bend(data)})
        return reply

    experiment = asked_for(*overrides)
    return rounds(experiment, path / RUN, see=see, last=last, grid_of=grid_of(sites))


def compressed(sites, data):
    """Its own key, written as OpenSSH does not write it."""
    compact = serialization.PublicFormat.CompressedPoint
    point = key_of(sites[EAST]).public_key().public_bytes(serialization.Encoding.X962, compact)
    parts = (b"ecdsa-sha2-nistp384", b"nistp384", point)
    blob = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    identity = b"ecdsa-sha2-nistp384 " + base64.b64encode(blob)
    return replace(Announcement.from_bytes(data), identity=identity).to_bytes()


BENT = {
    "zero": lambda sites, data: announce(RUN, bytes(32), key_of(sites[EAST])).to_bytes(),
    "short": lambda sites, data: announce(RUN, b"short", key_of(sites[EAST])).to_bytes(),
    "compressed": compressed,
}


@pytest.mark.parametrize("kind", slow_but(BENT, "compressed"))
def test_an_announcement_that_is_of_no_use_costs_its_sender_its_place(sites, tmp_path, kind):
    ran = play(sites, tmp_path, "announce", lambda data: BENT[kind](sites, data), last=1)
    assert ran.told("summed", "sites") == [3]
    assert ran.told("client_failed", "client") == [str(EAST)]
    assert [site.errors() for site in sites[:EAST]] == [[], [], []]


def closed_shares(data):
    """Boxes that nobody can open."""
    message = Prepared.from_bytes(data)
    return replace(
        message, encrypted_shares=tuple(bytes(48) for _ in message.encrypted_shares)
    ).to_bytes()


def test_shares_that_do_not_open_cost_one_round_and_then_their_sender(sites, tmp_path):
    ran = play(sites, tmp_path, "prepare", closed_shares, "federation.rounds=3")
    assert len(ran.told("round_lost", "reason")) == 1
    assert ran.told("client_blamed", "client") == [str(EAST)] * 3
    assert ran.told("summed", "sites") == [3]
    for site in sites[:EAST]:
        (line,) = site.errors()
        assert sites[EAST].fingerprint in line


def test_one_accuser_puts_nobody_out(sites, tmp_path):
    """It could accuse all others, one after another."""

    def one_box(data):
        message = Prepared.from_bytes(data)
        return replace(
            message, encrypted_shares=(bytes(48), *message.encrypted_shares[1:])
        ).to_bytes()

    ran = play(sites, tmp_path, "prepare", one_box, "federation.rounds=3")
    assert set(ran.told("client_blamed", "client")) == {str(EAST)}
    assert len(set(ran.told("client_blamed", "by"))) == 1
    assert ran.told("summed", "sites") == [3, 3]


def test_a_mask_key_that_is_none_is_charged_to_nobody(tmp_path):
    """Everybody could open the shares, train and be charged, and then fail."""
    sites = make_sites(tmp_path, policy=NOISED)

    def zero_key(data):
        message, zero = Prepared.from_bytes(data), bytes(32)
        state = SiteState.from_bytes((sites[EAST].state / "secure-sum.state").read_bytes())
        terms = state.rounds[-1].terms
        own = terms.position(state.site)
        encrypted = tuple(
            encrypt_shares(state.channel(peer), terms.context, own, at, zero, zero)
            for at, peer in enumerate(terms.cohort)
            if at != own
        )
        return replace(message, mask_key=zero, encrypted_shares=encrypted).to_bytes()

    ran = play(sites, tmp_path, "prepare", zero_key, *PRIVATE, "privacy.dropouts=1")
    assert set(ran.told("client_failed", "client")) == {str(EAST)}
    assert ran.told("summed", "sites") == [3, 3]
    assert [len(Ledger(site.folder / "state").events()) for site in sites] == [2, 2, 2, 0]


def far_update(words):
    """Entries + 16 in the sum, and a weight of next to nothing, by which they are divided."""
    words[:8] += words.dtype.type(2**30)
    words[-3:-2] -= words.dtype.type(int(3.99 * finest_scale(1.0, 4, 32)))


def far_gradient(words):
    words[:8] += words.dtype.type(2**55)


def huge_step(words):
    """Within the bounds of the ring, beyond what a model can have."""
    words[:8] += words.dtype.type(2**53)


SUMS = {
    "update": (far_update, "<u4", ("federation.rounds=5",)),
    "gradient": (far_gradient, "<u8", PRIVATE),
    "step": (huge_step, "<u8", PRIVATE),
}


@pytest.mark.parametrize("kind", slow_but(SUMS, "update"))
def test_a_sum_that_no_model_could_take_costs_its_round(tmp_path, kind):
    add, ring, overrides = SUMS[kind]
    sites, bent = make_sites(tmp_path, policy=NOISED if ring == "<u8" else OPEN), []

    def poison(data):
        if bent:
            return data
        bent.append(True)
        message = Masked.from_bytes(data)
        words = np.frombuffer(message.words, ring).copy()
        add(words)
        return Masked(message.context, words.tobytes()).to_bytes()

    ran = play(sites, tmp_path, "mask", poison, *overrides)
    assert len(ran.told("round_lost", "reason")) == 1
    assert ran.told("summed", "sites") == [4, 4]
    assert not ran.told("client_failed", "client")
