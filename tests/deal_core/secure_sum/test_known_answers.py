"""The document's values are this code's, and those of another library that follows the text."""

import base64
import hashlib
import hmac
import json
from pathlib import Path

import numpy as np
import pytest
from Crypto.Cipher import AES
from Crypto.Hash import SHA256
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.Protocol.SecretSharing import Shamir
from Crypto.Util import Counter

from deal_core.secure_sum.keys import BLOCK_BYTES, add_masks, ring_type
from tests.deal_core.secure_sum.known_answers import known_answers

VECTORS = Path(__file__).parents[3] / "docs/secure-aggregation-vectors.json"


@pytest.fixture(scope="module")
def answers():
    return json.loads(VECTORS.read_text(encoding="utf-8"))


def frame(kind, *parts):
    framed = b"DSS2" + bytes([len(kind)]) + kind.encode()
    return framed + b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def derive(secret, purpose, *context):
    return HKDF(secret, 32, b"", SHA256, context=frame(purpose, *context))


def exchange(private, public):
    return key_agreement(
        static_priv=import_x25519_private_key(private),
        static_pub=import_x25519_public_key(public),
        kdf=lambda secret: secret,
    )


def public(private):
    return import_x25519_private_key(private).public_key().export_key(format="raw")


def number(value):
    return value.to_bytes(8, "little")


def stream(key):
    return np.frombuffer(AES.new(key, AES.MODE_CTR, nonce=b"").encrypt(bytes(16)), "<u4")


class Second:
    """The protocol once more, from the document, with pycryptodome."""

    def __init__(self, answers):
        self.answers = answers
        self.context = hashlib.sha256(bytes.fromhex(answers["terms"])).digest()
        self.sites = answers["sites"]

    def of(self, at, name):
        return bytes.fromhex(self.sites[at][name])

    def site(self, at):
        return base64.b64decode(self.sites[at]["fingerprint"].removeprefix("SHA256:") + "=")

    def channel(self, one, other):
        privates = {at: self.of(at, "channel private") for at in (one, other)}
        ends = sorted((self.site(at), public(privates[at])) for at in (one, other))
        secret = exchange(privates[one], public(privates[other]))
        run = self.answers["run"].encode()
        return derive(secret, "channel", run, *(part for end in ends for part in end))

    def mask_private(self, at):
        return derive(self.of(at, "mask seed"), "mask key", self.context)

    def pair(self, one, other):
        secret = exchange(self.mask_private(one), self.of(other, "mask key"))
        ends = number(min(one, other)), number(max(one, other))
        return stream(derive(secret, "pair mask", self.context, *ends))

    def masked(self, at):
        words = np.array(self.sites[at]["values"], np.int64).astype("<u4")
        words = words + stream(derive(self.of(at, "self seed"), "self mask", self.context))
        for other in range(3):
            if other != at:
                words = words + (self.pair(at, other) if other > at else -self.pair(at, other))
        return words

    def shares(self, sender, receiver):
        ends = number(sender), number(receiver)
        key = derive(
            self.channel(sender, receiver), "box", self.context, *ends, self.of(sender, "mask key")
        )
        box = bytes.fromhex(self.sites[sender]["boxes"][receiver - (receiver > sender)])
        cipher = AES.new(key, AES.MODE_GCM, nonce=bytes(12))
        cipher.update(self.context)
        return cipher.decrypt_and_verify(box[:-16], box[-16:])


def test_the_document_has_the_values_of_this_code(answers):
    assert answers == known_answers()


def test_another_library_makes_the_same_keys_and_masked_vectors(answers):
    second = Second(answers)
    assert second.context.hex() == answers["context"]
    for at in range(3):
        assert public(second.mask_private(at)) == second.of(at, "mask key")
        seed = second.of(at, "self seed")
        assert derive(seed, "self commitment", second.context) == second.of(at, "commitment")
    for at in range(2):
        assert second.masked(at).tobytes().hex() == answers["masked"][at]


def test_another_library_opens_the_boxes_and_combines_the_shares(answers):
    second = Second(answers)
    for at in range(3):
        others = [other for other in range(3) if other != at]
        both = {other: second.shares(at, other) for other in others}
        for name, part in (("mask seed", slice(0, 16)), ("self seed", slice(16, 32))):
            shares = [(other + 1, both[other][part]) for other in others]
            assert Shamir.combine(shares) == second.of(at, name)
    # Of the two that survived the self seed is revealed, of the third the mask seed.
    for at, name in enumerate(("self seed", "self seed", "mask seed")):
        shares = [(k + 1, bytes.fromhex(answers["unmasked"][k][at])) for k in range(2)]
        assert Shamir.combine(shares) == second.of(at, name)


def test_another_library_makes_the_same_tags_and_the_sum(answers):
    second = Second(answers)
    for sender, receiver in ((0, 1), (1, 0)):
        ends = number(sender), number(receiver)
        key = derive(second.channel(0, 1), "agreement", second.context, *ends)
        tag = hmac.new(key, b"\x03", hashlib.sha256).digest()[:16]
        assert [tag.hex()] == answers["tags"][sender]
    total = sum(np.frombuffer(bytes.fromhex(each), "<u4") for each in answers["masked"])
    for at in range(2):
        total = total - stream(derive(second.of(at, "self seed"), "self mask", second.context))
        total = total - second.pair(at, 2)
    assert total.astype("<u4").view("<i4").tolist() == answers["sum"]
    plain = np.sum([second.sites[at]["values"] for at in range(2)], axis=0)
    assert answers["sum"] == plain.tolist()


KEYS = [bytes([k]) * 32 for k in range(3)]


def reference(key, length, bits):
    """The stream of another library."""
    cipher = AES.new(key, AES.MODE_CTR, counter=Counter.new(128, initial_value=0))
    return np.frombuffer(cipher.encrypt(bytes(length * bits // 8)), ring_type(bits))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("length", [1, 3, BLOCK_BYTES // 8, BLOCK_BYTES // 4 + 1, 100_001])
def test_streams_are_those_of_another_library(bits, length):
    vector = np.arange(length).astype(ring_type(bits))
    before = vector.copy()
    add_masks(vector, KEYS[:2], KEYS[2:3])
    first, second, third = (reference(key, length, bits) for key in KEYS[:3])
    assert np.array_equal(vector, before + first + second - third)
    add_masks(vector, KEYS[2:3], KEYS[:2])
    assert np.array_equal(vector, before)
