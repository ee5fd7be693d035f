"""A site's part before the first round: its channel key, and the keys it shares with its peers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum.identity import Announcement, Pins, announce, fingerprint, site_of, verify
from deal_core.secure_sum.keys import KEY_BYTES, derive, public_half, shared_secret
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.site_state import SiteState


def open_run(
    run: str,
    identity: ec.EllipticCurvePrivateKey,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> SiteState:
    """Return a fresh state; its ``announcement`` goes to the server, for all sites.

    Args:
        run: name of the run, the same at all sites.
        identity: the site's registered key.
        random_bytes: number of bytes -> fresh random bytes.
    """
    private = random_bytes(KEY_BYTES)
    announcement = announce(run, public_half(private), identity)
    return SiteState(run, site_of(identity.public_key()), private, announcement.to_bytes())


def meet_peers(state: SiteState, announcements: Sequence[bytes], pins: Pins | None) -> SiteState:
    """Return the state with a channel to each site that has announced itself.

    The same announcements may come again, and others later; a peer has one channel key in a run.

    Args:
        state: of this site.
        announcements: as the server passes them on; the site's own among them is skipped.
        pins: peers that this site knows; None where its policy trusts the server not to pose as a
            site.

    Raises:
        ProtocolError: an announcement is not its site's, or a second one of the same site.
    """
    channels = dict(state.channels)
    for data in announcements:
        announcement = Announcement.from_bytes(data)
        if data == state.announcement:
            continue
        peer, key = announcement.site, announcement.channel_key
        if peer == state.site:
            raise ProtocolError("somebody else announces a channel key as this site's")
        if peer in channels and channels[peer][:KEY_BYTES] == key:
            continue
        verify(announcement, state.run, pins)
        if peer in channels:
            raise ProtocolError(
                f"site {fingerprint(peer)} has announced two channel keys in one run", peer
            )
        channels[peer] = key + channel_key(state, peer, key)
    return replace(state, channels=channels)


def channel_key(state: SiteState, peer: bytes, public: bytes) -> bytes:
    """Return the key that this site and a peer share for the run; both get the same.

    Raises:
        ProtocolError: the peer's public half is no key.
    """
    ends = sorted([(state.site, public_half(state.channel_private)), (peer, public)])
    secret = shared_secret(state.channel_private, public)
    return derive(secret, "channel", state.run.encode(), *(part for end in ends for part in end))
