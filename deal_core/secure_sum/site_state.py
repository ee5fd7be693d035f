"""What a site must remember of a run: kept, durably, before each reply leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deal_core.secure_sum.frames import join, pack, split, unpack
from deal_core.secure_sum.identity import SITE_BYTES
from deal_core.secure_sum.keys import KEY_BYTES
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.shamir import SECRET_BYTES
from deal_core.secure_sum.terms import RoundTerms


@dataclass(frozen=True)
class Answered:
    """A request that was answered, and the answer, to the byte."""

    leg: str
    request: bytes
    reply: bytes


@dataclass(frozen=True)
class SiteRound:
    """One round at one site.

    Attributes:
        terms: of the round.
        mask_seed, self_seed: the site's secrets; empty once the vector is masked.
        own_shares: its own shares of both, 32 bytes.
        members: positions of all who prepared, as ``mask`` named them.
        shares: of every member (this site among them) its share of the mask seed and of the self
            seed, 32 bytes; empty once they are answered.
        survivors: as ``confirm`` named them.
        answered: a request of each leg that is over.
    """

    terms: RoundTerms
    mask_seed: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    own_shares: bytes = field(repr=False)
    members: bytes = b""
    shares: tuple[bytes, ...] = field(default=(), repr=False)
    survivors: bytes = b""
    answered: tuple[Answered, ...] = field(default=(), repr=False)

    def to_bytes(self) -> bytes:
        """Return the record; it holds secrets."""
        answers = [
            part for each in self.answered for part in (each.leg.encode(), each.request, each.reply)
        ]
        return pack(
            "site-round",
            self.terms.to_bytes(),
            self.mask_seed,
            self.self_seed,
            self.own_shares,
            self.members,
            join(self.shares),
            self.survivors,
            *answers,
        )

    @staticmethod
    def from_bytes(data: bytes) -> SiteRound:
        """Return the round of a record."""
        terms, mask_seed, self_seed, own, members, shares, survivors, *answers = unpack(
            "site-round", data
        )
        answered = tuple(
            Answered(answers[k].decode(), answers[k + 1], answers[k + 2])
            for k in range(0, len(answers), 3)
        )
        return SiteRound(
            RoundTerms.from_bytes(terms),
            mask_seed,
            self_seed,
            own,
            members,
            split(shares, 2 * SECRET_BYTES),
            survivors,
            answered,
        )


@dataclass(frozen=True)
class SiteState:
    """A run at one site.

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
        """Return the round with these terms.

        Raises:
            ProtocolError: no such round was prepared, or it is long past.
        """
        for each in self.rounds:
            if each.terms.context == context:
                return each
        raise ProtocolError("this site has prepared no round with these terms")

    def with_round(self, changed: SiteRound) -> SiteState:
        """Return the state with a new round, or with a round that has moved on."""
        others = [each for each in self.rounds if each.terms.number != changed.terms.number]
        rounds = sorted([*others, changed], key=lambda each: each.terms.number)
        return replace(self, rounds=tuple(rounds[-2:]))

    def to_bytes(self) -> bytes:
        """Return the record; it holds secrets."""
        return pack(
            "site-state",
            self.run.encode(),
            self.site,
            self.channel_private,
            self.announcement,
            join([peer + keys for peer, keys in sorted(self.channels.items())]),
            *(each.to_bytes() for each in self.rounds),
        )

    @staticmethod
    def from_bytes(data: bytes) -> SiteState:
        """Return the state of a record."""
        run, site, private, announcement, channels, *rounds = unpack("site-state", data)
        peers = split(channels, SITE_BYTES + 2 * KEY_BYTES)
        return SiteState(
            run.decode(),
            site,
            private,
            announcement,
            {peer[:SITE_BYTES]: peer[SITE_BYTES:] for peer in peers},
            tuple(SiteRound.from_bytes(each) for each in rounds),
        )
