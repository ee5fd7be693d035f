"""Masks: their keys, and AES-256 in counter mode as words of the ring, added in place.

A site has two secrets in a round: of the mask seed come the masks that it shares with each peer,
of the self seed the mask that it adds by itself. AES-CTR gives 8.3 GB/s here, ChaCha20 5.3 (one
core with VAES, OpenSSL 4); each key is used for one stream, so that the counter starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from deal_core.secure_sum.keys import derive, shared_secret
from deal_core.secure_sum.messages import number_bytes

Words = NDArray[np.unsignedinteger[Any]]
BLOCK_BYTES = 1 << 17
"""Worked on at a time, by all streams: vector and stream stay in the processor's cache."""


def ring_type(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the type of a ring's words, little endian; its sums wrap."""
    return np.dtype(f"<u{bits // 8}")


def add_masks(vector: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the streams of some keys to a vector, and take those of others away, in place.

    Args:
        vector: ring words, one-dimensional and contiguous.
        plus: keys of 32 bytes, each of which has made no other stream.
        minus: the same, of the streams to take away.
    """
    streams: list[tuple[Any, np.ufunc]] = [(mask_stream(key), np.add) for key in plus]
    streams += [(mask_stream(key), np.subtract) for key in minus]
    zeros, buffer = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    mask = np.frombuffer(buffer, vector.dtype)
    step = len(mask)
    for start in range(0, len(vector), step):
        piece = vector[start : start + step]
        still = memoryview(zeros)[: piece.nbytes]
        for stream, apply in streams:
            stream.update_into(still, buffer)
            apply(piece, mask[: len(piece)], out=piece)


def mask_stream(key: bytes) -> Any:
    """Return the keystream of a key, as a cipher that has not begun."""
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()


def mask_private_key(mask_seed: bytes, context: bytes) -> bytes:
    """Return the X25519 private key of the pairwise masks of one round."""
    return derive(mask_seed, "mask key", context)


def pair_mask_key(private: bytes, peer_public: bytes, context: bytes, own: int, peer: int) -> bytes:
    """Return the stream key of the mask that two sites share; both ends get the same.

    Args:
        private: one site's mask key.
        peer_public: the other's public half.
        context: digest of the terms.
        own: position of the one.
        peer: position of the other.
    """
    ends = number_bytes(min(own, peer)), number_bytes(max(own, peer))
    return derive(shared_secret(private, peer_public), "pair mask", context, *ends)


def self_mask_key(self_seed: bytes, context: bytes) -> bytes:
    """Return the stream key of the mask that a site adds by itself."""
    return derive(self_seed, "self mask", context)


def commitment(self_seed: bytes, context: bytes) -> bytes:
    """Return what tells the server that the self seed it put together is the site's."""
    return derive(self_seed, "self commitment", context)
