"""Shamir's secret sharing over GF(2^128), for many secrets over the same points.

A secret of 16 bytes is the constant term of a random polynomial of degree ``threshold - 1``; the
share of point ``x`` is its value there. Field, points (1, 2, …) and bytes are those of
pycryptodome's ``Crypto.Protocol.SecretSharing.Shamir``, which opens these shares and whose shares
open here. That library computes the same for each secret anew and takes 74 ms to split and 60 ms to
combine one among 100 sites, ten times what is needed here; a round has 200 secrets.

No branch and no number of steps depends on a secret: loops run over bits of points, which are
public. Source: Shamir, "How to share a secret", CACM 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SECRET_BYTES = 16
FIELD = (1 << 128) | 0b10000111
"""x^128 + x^7 + x^2 + x + 1, one bit a coefficient."""
_LOW = (1 << 128) - 1


def split(
    secret: bytes, threshold: int, points: int, random_bytes: Callable[[int], bytes]
) -> list[bytes]:
    """Return the shares of points 1 to ``points``; any ``threshold`` of them give the secret, and
    fewer tell nothing about it.

    Args:
        secret: 16 bytes.
        threshold: from 1 to ``points``.
        points: how many shares.
        random_bytes: number of bytes -> fresh random bytes, for the coefficients.
    """
    draws = random_bytes(SECRET_BYTES * (threshold - 1))
    coefficients = [
        int.from_bytes(draws[start : start + SECRET_BYTES], "big")
        for start in range(0, len(draws), SECRET_BYTES)
    ]
    constant = int.from_bytes(secret, "big")
    shares = []
    for point in range(1, points + 1):
        value = 0
        for coefficient in coefficients:
            value = multiply(value ^ coefficient, point)
        shares.append((value ^ constant).to_bytes(SECRET_BYTES, "big"))
    return shares


def combining_weights(points: Sequence[int]) -> list[int]:
    """Return Lagrange's weights at zero: a secret is the sum of weight times share.

    Args:
        points: as many as the threshold, all different, none zero.
    """
    product = 1
    for point in points:
        product = multiply(product, point)
    weights = []
    for point in points:
        denominator = point
        for other in points:
            if other != point:
                denominator = multiply(denominator, point ^ other)
        weights.append(multiply(product, inverse(denominator)))
    return weights


def combine(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """Return the secret of these shares, in the order of the points of the weights."""
    value = 0
    for weight, share in zip(weights, shares, strict=True):
        value ^= multiply(int.from_bytes(share, "big"), weight)
    return value.to_bytes(SECRET_BYTES, "big")


def multiply(value: int, public: int) -> int:
    """Return the product of two elements; the loop runs over the bits of the second."""
    product = 0
    while public:
        lowest = public & -public
        product ^= value << (lowest.bit_length() - 1)
        public ^= lowest
    return reduced(product)


def reduced(product: int) -> int:
    """Return the remainder of a polynomial of degree below 256."""
    for _ in range(2):
        high = product >> 128
        product = (product & _LOW) ^ high ^ (high << 1) ^ (high << 2) ^ (high << 7)
    return product


def inverse(public: int) -> int:
    """Return the inverse of a public element that is not zero, by Euclid's algorithm."""
    value, other, factor, other_factor = public, FIELD, 1, 0
    while value != 1:
        shift = value.bit_length() - other.bit_length()
        if shift < 0:
            value, other = other, value
            factor, other_factor = other_factor, factor
            shift = -shift
        value ^= other << shift
        factor ^= other_factor << shift
    return reduced(factor)
