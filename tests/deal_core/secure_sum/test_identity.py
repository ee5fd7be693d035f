"""Channel keys are their site's: what a server in the middle exchanges is refused."""

import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from deal_core.secure_sum.keys import (
    Announcement,
    announce,
    fingerprint,
    public_half,
    site_of,
    site_of_fingerprint,
)
from deal_core.secure_sum.messages import ProtocolError
from deal_core.secure_sum.site_state import SiteState, meet_peers, open_run
from simulations.deployment.keys import make_key_pair
from tests.deal_core.secure_sum.rounds import RUN, identities

ALICE, BOB, CAROL = identities(3)


@pytest.fixture
def alice():
    return open_run(RUN, ALICE)


PINS = {site_of(BOB.public_key()): "bob", site_of(CAROL.public_key()): "carol"}


def test_both_ends_of_a_channel_have_one_key_and_nobody_else(alice):
    bob, carol = open_run(RUN, BOB), open_run(RUN, CAROL)
    everybody = [alice.announcement, bob.announcement, carol.announcement]
    met = [meet_peers(state, everybody, None) for state in (alice, bob, carol)]
    assert met[0].channel(bob.site) == met[1].channel(alice.site)
    assert (
        len({met[0].channel(bob.site), met[0].channel(carol.site), met[1].channel(carol.site)}) == 3
    )
    # The same announcements again, and in another order: no change.
    assert meet_peers(met[0], everybody[::-1], PINS) == met[0]


def test_another_run_has_other_channels(alice):
    bob = open_run(RUN, BOB)
    other = SiteState("run-2", alice.site, alice.channel_private, alice.announcement)
    bob_again = announce("run-2", public_half(bob.channel_private), BOB).to_bytes()
    first = meet_peers(alice, [bob.announcement], PINS)
    second = meet_peers(other, [bob_again], PINS)
    assert first.channel(bob.site) != second.channel(bob.site)


def test_a_channel_key_that_the_server_exchanged_is_refused(alice):
    theirs = Announcement.from_bytes(open_run(RUN, BOB).announcement)
    swapped = Announcement(RUN, theirs.identity, public_half(os.urandom(32)), theirs.signature)
    for pins in (PINS, None):
        with pytest.raises(ProtocolError, match="not signed by that site: somebody stands between"):
            meet_peers(alice, [swapped.to_bytes()], pins)


def test_a_server_that_signs_with_a_key_of_its_own_is_not_pinned(alice):
    server = open_run(RUN, ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(ProtocolError, match="not among the pinned peers") as refusal:
        meet_peers(alice, [server.announcement], PINS)
    assert fingerprint(server.site) in str(refusal.value)
    assert refusal.value.site == server.site
    # Without pins the server is trusted not to do so.
    assert server.site in meet_peers(alice, [server.announcement], None).channels


def test_an_announcement_of_another_run_is_refused(alice):
    old = open_run("run-0", BOB).announcement
    with pytest.raises(ProtocolError, match="for another run"):
        meet_peers(alice, [old], PINS)
    renamed = replace(Announcement.from_bytes(old), run=RUN).to_bytes()
    with pytest.raises(ProtocolError, match="not signed by that site"):
        meet_peers(alice, [renamed], PINS)


def test_one_site_has_one_channel_key_in_a_run(alice):
    met = meet_peers(alice, [open_run(RUN, BOB).announcement], PINS)
    with pytest.raises(ProtocolError, match="two channel keys in one run"):
        meet_peers(met, [open_run(RUN, BOB).announcement], PINS)
    with pytest.raises(ProtocolError, match="as this site's"):
        meet_peers(alice, [open_run(RUN, ALICE).announcement], PINS)


@pytest.mark.parametrize("key", [bytes(32), bytes([1]) + bytes(31), b"short"])
def test_a_key_that_gives_everybody_the_same_secret_is_refused(alice, key):
    with pytest.raises(ProtocolError, match="is no X25519 key"):
        meet_peers(alice, [announce(RUN, key, BOB).to_bytes()], PINS)


def test_identities_of_other_kinds_are_refused(alice):
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ed = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*openssh)
    for line in (ed, b"", b"ecdsa-sha2-nistp384 !", b"ecdsa-sha2-nistp384 AAAA"):
        with pytest.raises(ProtocolError, match="an identity is no"):
            meet_peers(alice, [Announcement(RUN, line, bytes(32), b"").to_bytes()], None)


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="no ssh-keygen here")
def test_the_fingerprint_is_what_ssh_keygen_prints(tmp_path):
    pair = make_key_pair("a site")
    (tmp_path / "key.pub").write_bytes(pair.public)
    printed = subprocess.run(
        ["ssh-keygen", "-l", "-f", tmp_path / "key.pub"], capture_output=True, text=True, check=True
    ).stdout
    private = serialization.load_ssh_private_key(pair.private, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert fingerprint(open_run(RUN, private).site) in printed


def test_a_fingerprint_names_its_site():
    site = site_of(ALICE.public_key())
    assert site_of_fingerprint(fingerprint(site)) == site
    for text in ("", "SHA256:abc", "MD5:" + fingerprint(site)[7:], fingerprint(site) + "="):
        with pytest.raises(ProtocolError, match="is no fingerprint"):
            site_of_fingerprint(text)


def test_secrets_are_in_no_text_of_a_state(alice):
    assert repr(alice.channel_private) not in repr(alice)
