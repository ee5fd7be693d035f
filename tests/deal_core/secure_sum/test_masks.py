"""Masks are AES-256-CTR, whatever the length, and go away again."""

from __future__ import annotations

import numpy as np
import pytest
from Crypto.Cipher import AES
from Crypto.Util import Counter

from deal_core.secure_sum.keys import BLOCK_BYTES, add_masks, ring_type

KEYS = [bytes([k]) * 32 for k in range(5)]


def reference(key: bytes, length: int, bits: int) -> np.ndarray:
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
