"""Where noise and samples come from: a cryptographic stream, or, in simulations, a seed.

Noise that others can predict, or whose last bits betray what it was added to, hides nothing. The
stream is AES-256 in counter mode under a key that is drawn from the system for each round and
forgotten. A Gaussian is the scaled sum of several independent draws: then the gaps between the
floating-point numbers that one draw can give no longer tell which sum it was added to.

Noise that is added up before anybody sees it is a discrete Gaussian: whole numbers with the density
of a Gaussian, for whole arrays at a time. What its source draws with exact fractions is drawn with
floating-point numbers here, each right to a relative error of ``2^-52`` down to probabilities of
``2^-54``: :func:`~deal_core.privacy.distributed_noise.density_gap` counts the difference.

Sources: Holohan & Braghin, arXiv 2107.10138 (several draws); Mironov, CCS 2012 (the attack);
Canonne, Kamath & Steinke, NeurIPS 2020, arXiv 2004.00010, algorithms 1 and 3 (discrete Gaussian).
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAWS = 4
"""Independent normals in one: what an attacker must guess at once grows as ``2^(53 (DRAWS-1))``."""
BITS = 2**53
"""Values that one draw of a source can have."""
Integers = NDArray[np.int64]


class NoiseSource(Protocol):
    """All randomness that a privacy guarantee rests on."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Independent standard normals, float64, on the CPU."""

    def uniform(self, count: int) -> Tensor:
        """Independent numbers in (0, 1], ``(count,)``, float64, on the CPU."""


class SecureNoise:
    """From the operating system's generator, stretched by AES-256-CTR; cannot be seeded."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._stream = cipher.encryptor()

    def uniform(self, count: int) -> Tensor:
        """Multiples of ``2^-53`` in (0, 1]."""
        return torch.from_numpy(self._uniform(count))

    def normal(self, shape: torch.Size) -> Tensor:
        """Sums of :data:`DRAWS` normals, each by Box and Muller's exact transform."""
        count = math.prod(shape)
        total = np.zeros(count)
        for _ in range(DRAWS // 2):
            radius = np.sqrt(-2 * np.log(self._uniform(count)))
            angle = 2 * math.pi * self._uniform(count)
            total += radius * (np.cos(angle) + np.sin(angle))
        return torch.from_numpy(total / math.sqrt(DRAWS)).view(shape)

    def _uniform(self, count: int) -> NDArray[np.float64]:
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64) >> np.uint64(11)
        return np.asarray((bits + np.uint64(1)) * 2.0**-53, np.float64)


class SeededNoise:
    """Equal seeds, equal numbers: for simulations alone."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def uniform(self, count: int) -> Tensor:
        """In (0, 1]."""
        return 1 - torch.rand(count, generator=self._generator, dtype=torch.float64)

    def normal(self, shape: torch.Size) -> Tensor:
        """One draw each."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)


def discrete_gaussian(count: int, sigma: float, noise: NoiseSource) -> Integers:
    """Return independent whole numbers, ``(count,)``: ``k`` with a probability proportional to
    ``exp(-k^2 / (2 sigma^2))``.

    Args:
        count: how many.
        sigma: positive, at most 2^31.
        noise: of all draws.

    Raises:
        ValueError: another sigma.
    """
    if not 0 < sigma <= 2**31:
        raise ValueError(f"no such sigma: {sigma}")
    width = int(sigma) + 1
    kept: list[Integers] = []
    missing = count
    while missing > 0:
        drawn = _discrete_laplace(2 * missing + 16, width, noise)
        gap = np.abs(drawn) - sigma**2 / width
        accepted = drawn[_uniform(len(drawn), noise) <= np.exp(-(gap**2) / (2 * sigma**2))]
        kept.append(accepted[:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept) if kept else np.empty(0, np.int64)


def _discrete_laplace(tries: int, width: int, noise: NoiseSource) -> Integers:
    """Return at most so many whole numbers with probabilities proportional to
    ``exp(-abs(k) / width)``."""
    low = _below(width, tries, noise)
    low = low[_uniform(len(low), noise) <= np.exp(-low / width)]
    high = np.floor(-np.log(_uniform(len(low), noise))).astype(np.int64)
    size = low + width * high
    negative = _uniform(len(low), noise) <= 0.5
    once = ~(negative & (size == 0))  # else zero would be drawn twice as often
    return np.where(negative, -size, size)[once]


def _below(width: int, count: int, noise: NoiseSource) -> Integers:
    """Return whole numbers below ``width``, each as likely as another; a few fewer than asked."""
    drawn = (noise.uniform(count).numpy() * BITS).astype(np.int64) - 1
    return np.asarray(drawn[drawn < BITS // width * width] % width, np.int64)


def _uniform(count: int, noise: NoiseSource) -> NDArray[np.float64]:
    """Return numbers in (0, 1] of 106 bits, rounded to the precision of their size."""
    high, low = noise.uniform(count).numpy(), noise.uniform(count).numpy()
    return np.asarray((high - 1 / BITS) + low / BITS, np.float64)
