"""Shares are those of pycryptodome, and fewer than the threshold tell nothing."""

import os

import pytest
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.secure_sum.shamir import FIELD, combine, combining_weights, inverse, multiply, split

ELEMENTS = st.integers(1, 2**128 - 1)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=16, max_size=16), st.data())
def test_each_opens_what_the_other_has_split(secret, data):
    points = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, points))
    some = data.draw(st.permutations(range(points)))[:threshold]
    own = split(secret, threshold, points, os.urandom)
    assert Shamir.combine([(at + 1, own[at]) for at in some]) == secret
    theirs = dict(Shamir.split(threshold, points, secret))
    weights = combining_weights([at + 1 for at in some])
    assert combine(weights, [theirs[at + 1] for at in some]) == secret


def test_equal_coefficients_give_the_shares_of_the_library(monkeypatch):
    drawn = [os.urandom(16) for _ in range(2)]
    secret, left = os.urandom(16), list(drawn)
    monkeypatch.setattr("Crypto.Protocol.SecretSharing.rng", lambda size: left.pop(0))
    theirs = [share for _, share in Shamir.split(3, 5, secret)]
    assert split(secret, 3, 5, lambda size: b"".join(drawn)) == theirs


@given(ELEMENTS, ELEMENTS, ELEMENTS)
def test_a_field(a, b, c):
    assert multiply(a, b) == multiply(b, a) < 2**128
    assert multiply(a, multiply(b, c)) == multiply(multiply(a, b), c)
    assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)
    assert multiply(a, inverse(a)) == 1
    assert inverse(1) == 1
    assert FIELD.bit_length() == 129


def test_one_share_short_every_secret_is_as_possible_as_any_other():
    secret = os.urandom(16)
    shares = split(secret, 3, 5, os.urandom)
    weights = combining_weights([1, 2, 5])
    reached = {combine(weights, [*shares[:2], bytes(15) + bytes([k])]) for k in range(256)}
    assert len(reached) == 256
    # For each secret there is one third share that gives it: the two tell nothing apart.
    for wanted in (bytes(16), secret, os.urandom(16)):
        part = int.from_bytes(combine(weights, [*shares[:2], bytes(16)]), "big")
        missing = multiply(part ^ int.from_bytes(wanted, "big"), inverse(weights[2]))
        assert combine(weights, [*shares[:2], missing.to_bytes(16, "big")]) == wanted


def test_a_false_share_gives_another_secret():
    secret = os.urandom(16)
    shares = split(secret, 2, 3, os.urandom)
    assert combine(combining_weights([1, 3]), [shares[0], shares[2]]) == secret
    assert combine(combining_weights([1, 3]), [shares[0], shares[1]]) != secret
    with pytest.raises(ValueError, match="shorter"):
        combine(combining_weights([1, 3]), shares[:1])
