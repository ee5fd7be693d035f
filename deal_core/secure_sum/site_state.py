"""What a site must remember of a run: kept, durably, before each reply leaves.

Its keys and channels, made when the run begins (SecAgg's AdvertiseKeys); the last rounds, each
exchange answered once, in its order: the same request has the same reply, another has none; and
which update was masked for which round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum.keys import (
    Announcement,
    Pins,
    announce,
    derive,
    fingerprint,
    public_half,
    shared_secret,
    site_of,
    verify,
)
from deal_core.secure_sum.messages import KEY_BYTES, Kept, ProtocolError, UsedUpdate
from deal_core.secure_sum.terms import RoundTerms


@dataclass(frozen=True)
class Answered:
    """A request that was answered, and the answer, to the byte."""

    exchange: str
    request: bytes
    reply: bytes


@dataclass(frozen=True)
class SiteRound:
    """One round at one site.

    Attributes:
        terms: of the round.
        mask_seed, self_seed: the site's secrets; empty once the vector is masked.
        own_shares: its own shares of both, 32 bytes; empty from then on as well.
        members: positions of all who prepared, as ``mask`` named them.
        shares: of every member (this site among them) its share of the mask seed and of the self
            seed, 32 bytes; empty once they are answered.
        survivors: as ``confirm`` named them.
        answered: a request of each exchange that is over.
    """

    terms: RoundTerms
    mask_seed: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    own_shares: bytes = field(repr=False)
    members: bytes = b""
    shares: tuple[bytes, ...] = field(default=(), repr=False)
    survivors: bytes = b""
    answered: tuple[Answered, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class SiteState(Kept):
    """A run at one site; the record holds secrets.

    Attributes:
        run: name of the run.
        site: who this is.
        channel_private: X25519 private key of the run's channels.
        announcement: the signed public half, as bytes.
        channels: peer -> its public key and the key that both share, 64 bytes.
        rounds: the last two that were prepared, the older first.
    """

    run: str
    site: bytes
    channel_private: bytes = field(repr=False)
    announcement: bytes
    channels: Mapping[bytes, bytes] = field(default_factory=dict, repr=False)
    rounds: tuple[SiteRound, ...] = ()

    def channel(self, peer: bytes) -> bytes:
        """Return the key that this site shares with a peer."""
        return self.channels[peer][KEY_BYTES:]

    def round_of(self, context: bytes) -> SiteRound:
        """Return the round with these terms; ProtocolError where none was prepared of late."""
        for each in self.rounds:
            if each.terms.context == context:
                return each
        raise ProtocolError("this site has prepared no round with these terms")

    def with_round(self, changed: SiteRound) -> SiteState:
        """Return the state with a new round, or with a round that has moved on."""
        others = [each for each in self.rounds if each.terms.number != changed.terms.number]
        rounds = sorted([*others, changed], key=lambda each: each.terms.number)
        return replace(self, rounds=tuple(rounds[-2:]))


def open_run(
    run: str,
    identity: ec.EllipticCurvePrivateKey,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> SiteState:
    """Return a fresh state, signed with the site's registered key; its ``announcement`` goes to the
    server, for all sites."""
    private = random_bytes(KEY_BYTES)
    announcement = announce(run, public_half(private), identity)
    return SiteState(run, site_of(identity.public_key()), private, announcement.to_bytes())


def meet_peers(state: SiteState, announcements: Sequence[bytes], pins: Pins | None) -> SiteState:
    """Return the state with a channel to each site that has announced itself.

    The same announcements may come again, and others later; a peer has one channel key in a run.
    The site's own is skipped.

    Args:
        state: of this site.
        announcements: as the server passes them on.
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
    """Return the key that this site and a peer share for the run; both get the same."""
    ends = sorted([(state.site, public_half(state.channel_private)), (peer, public)])
    secret = shared_secret(state.channel_private, public)
    return derive(secret, "channel", state.run.encode(), *(part for end in ends for part in end))


@dataclass(frozen=True)
class UsedUpdates(Kept):
    """Attributes: ``masked``, place in the run to the digest of its round's terms, in hexadecimal,
    and the name of the update."""

    masked: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def masking(self, context: bytes, place: str, update: str) -> UsedUpdates:
        """Return the record after the update of a place in the run was masked for a round; the same
        again is the same.

        Raises:
            UsedUpdate: the place was masked for another round, or with another update.
        """
        wanted = context.hex(), update
        if self.masked.get(place, wanted) != wanted:
            raise UsedUpdate(
                f"{place}: this site has masked its update for a sum already, and a second sum "
                "would tell the difference; nothing was sent"
            )
        return UsedUpdates({**self.masked, place: wanted})
