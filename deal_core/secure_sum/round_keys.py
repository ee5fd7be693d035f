"""The two secrets of a site in a round, and the keys that come from them."""

from __future__ import annotations

from deal_core.secure_sum.frames import number_bytes
from deal_core.secure_sum.keys import derive, shared_secret


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
