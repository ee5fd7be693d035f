"""Explicit generators: one for each purpose, each derived from the run's seed."""

import hashlib

import numpy as np
import torch


def seeded(*parts: int | str) -> torch.Generator:
    """Return a generator that depends on all of ``parts``, in order, and on nothing else.

    The same parts give the same stream in every process and engine:
    ``seeded(seed, "client", "2", stage, server_round)``.
    """
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def seeded_numpy(*parts: int | str) -> np.random.Generator:
    """Return numpy's, from :func:`seeded`."""
    return np.random.default_rng(seeded(*parts).initial_seed())
