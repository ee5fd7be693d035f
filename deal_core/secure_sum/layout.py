"""Named numbers as one vector of ring words, and a sum of such vectors as numbers again.

A number is a multiple of a grid's step, rounded at random so that its mean is the number itself, or
an integer that passes as it is. The bound on each number and the number of sites are part of the
layout, so that no sum can leave the ring: what is out of bounds is refused at the site.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deal_core.secure_sum.keys import Words, ring_type
from deal_core.secure_sum.messages import ProtocolError

COVERED = None
"""In the place of an array: words drawn from the whole ring, so that the field's sum says nothing
of what other sites have added."""


@dataclass(frozen=True)
class SumField:
    """One array of the vector."""

    name: str
    shape: tuple[int, ...]
    largest: float
    """Bound on the absolute value of every entry at one site."""
    scale: float | None = None
    """Grid points in a unit; None: integers, which are not rounded."""
    coverable: bool = False
    """A site may put :data:`COVERED` here, so that the sum can be any word."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def most_points(self) -> int:
        """Largest grid point of one site, rounding included."""
        return math.ceil(self.largest * (self.scale or 1))


@dataclass(frozen=True)
class Encoded:
    """A site's vector in the ring, the digest of its layout, and how many ``sites`` may be
    summed."""

    layout: bytes
    sites: int
    words: Words


@dataclass(frozen=True)
class Layout:
    """What the words of a vector mean, of ``bits`` each; the same at all sites and at the
    server."""

    fields: tuple[SumField, ...]
    bits: int
    sites: int
    """Most that are summed."""
    basis: str = ""
    """What else must be the same at all of them."""

    def __post_init__(self) -> None:
        """Refuse, with ProtocolError, a layout whose sums could leave the ring."""
        if len({field.name for field in self.fields}) != len(self.fields):
            raise ProtocolError("a layout names a field twice")
        for field in self.fields:
            bounded = math.isfinite(field.largest) and field.largest >= 0
            scaled = field.scale is None or (math.isfinite(field.scale) and field.scale > 0)
            if not bounded or not scaled:
                raise ProtocolError(f"field '{field.name}': bound or scale is no usable number")
            if self.sites * field.most_points >= 1 << (self.bits - 1):
                raise ProtocolError(
                    f"field '{field.name}': the sum of {self.sites} sites can leave a ring of "
                    f"{self.bits} bits; take a coarser scale, a smaller bound or 64 bits"
                )

    @property
    def length(self) -> int:
        """Words of a vector."""
        return sum(field.size for field in self.fields)

    @property
    def digest(self) -> bytes:
        """Of all that the layout says, 32 bytes: SHA-256 of a JSON list without spaces."""
        fields = [
            [each.name, each.shape, float(each.largest), each.scale and float(each.scale)]
            for each in self.fields
        ]
        said = [self.bits, self.sites, fields, *([self.basis] if self.basis else [])]
        return hashlib.sha256(json.dumps(said, separators=(",", ":")).encode()).digest()

    def encode(
        self, values: Mapping[str, ArrayLike | None], generator: np.random.Generator
    ) -> Encoded:
        """Return a site's vector.

        Args:
            values: an array for each field, and no other; or :data:`COVERED`.
            generator: of the random rounding.

        Raises:
            ProtocolError: an array is missing, of another shape, out of bounds or not finite; the
                line names the field, and no value.
        """
        if set(values) != {field.name for field in self.fields}:
            raise ProtocolError("the vector has other fields than its layout")
        parts = [self._words(field, values[field.name], generator) for field in self.fields]
        words = np.concatenate(parts) if parts else np.zeros(0, ring_type(self.bits))
        return Encoded(self.digest, self.sites, words)

    def _words(
        self, field: SumField, values: ArrayLike | None, generator: np.random.Generator
    ) -> Words:
        """The words of one field. What covers is drawn from the system: a seed is known to all."""
        ring = ring_type(self.bits)
        if values is COVERED:
            return np.frombuffer(secrets.token_bytes(field.size * ring.itemsize), ring)
        array = np.asarray(values)
        if array.shape != field.shape:
            raise ProtocolError(f"field '{field.name}' has another shape than its layout")
        if field.scale is None and not np.issubdtype(array.dtype, np.integer):
            raise ProtocolError(f"field '{field.name}' takes integers alone")
        flat = array.reshape(-1)
        if not np.all((flat >= -field.largest) & (flat <= field.largest)):
            raise ProtocolError(
                f"field '{field.name}' has a value that is out of its bound or no number: clip it "
                "before; nothing was sent"
            )
        if field.scale is None:
            return flat.astype(np.int64).astype(ring)
        return round_at_random(flat.astype(np.float64) * field.scale, generator).astype(ring)

    def decode(self, total: Words, summed: int | None = None) -> dict[str, NDArray[Any]]:
        """Return the sums: float64, or int64 where integers were summed.

        Args:
            total: the sum in the ring.
            summed: of how many sites it is; None: of as many as the layout allows.

        Raises:
            ProtocolError: the sum is not of this layout, or one that so many sites within their
                bounds cannot add up to.
        """
        if len(total) != self.length or total.dtype != ring_type(self.bits):
            raise ProtocolError("a sum has not the length or the ring of its layout")
        points = total.view(f"<i{self.bits // 8}").astype(np.int64)
        sums: dict[str, NDArray[Any]] = {}
        start = 0
        for field in self.fields:
            part = points[start : start + field.size].reshape(field.shape)
            most = (self.sites if summed is None else summed) * field.most_points
            if not field.coverable and bool(((part > most) | (part < -most)).any()):
                raise ProtocolError(f"field '{field.name}': no sum of sites within their bounds")
            sums[field.name] = part if field.scale is None else part / field.scale
            start += field.size
        return sums


def finest_scale(largest: float, sites: int, bits: int) -> float:
    """Return the largest power of two that keeps a sum of ``sites`` numbers up to ``largest`` in
    the ring.

    Raises:
        ProtocolError: ``largest`` is not positive and finite.
    """
    if not (math.isfinite(largest) and largest > 0):
        raise ProtocolError("the bound on a number to be summed must be positive and finite")
    most = ((1 << (bits - 1)) - 1) // sites
    scale = math.ldexp(1.0, math.frexp(most)[1] - math.frexp(largest)[1] + 1)
    while math.ceil(largest * scale) > most:
        scale /= 2
    return scale


def round_at_random(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[Any]:
    """Return integers, int64, each one of the two next to its value, with the value as its mean."""
    whole = np.floor(values)
    up = generator.random(values.shape) < values - whole
    return whole.astype(np.int64) + up
