"""Where noise and samples come from: a cryptographic stream, or, in simulations, a seed.

Noise that others can predict, or whose last bits betray what it was added to, hides nothing. The
stream is AES-256 in counter mode under a key that is drawn from the system for each round and
forgotten. A Gaussian is the scaled sum of several independent draws: then the gaps between the
floating-point numbers that one draw can give no longer tell which sum it was added to.

Sources: Holohan & Braghin, arXiv 2107.10138 (several draws); Mironov, CCS 2012 (the attack).
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
