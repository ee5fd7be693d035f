"""A run among sites in one process: every record and message passes through its bytes."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partialmethod

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum import server_round, site_round
from deal_core.secure_sum.keys import Words
from deal_core.secure_sum.layout import Encoded, Layout, SumField
from deal_core.secure_sum.server_round import ServerRound, open_round, unmasked_sum
from deal_core.secure_sum.site_state import SiteState, meet_peers, open_run
from deal_core.secure_sum.terms import RoundTerms, SitePolicy

RUN = "run-1"
DONE = {"prepare": "prepared", "mask": "masked", "confirm": "confirmed", "unmask": "unmasked"}
EXCHANGES = tuple(DONE)
LEAST = 2
"""min_cohort of the sites here, but where it is what a test is about."""
States = Mapping[bytes, SiteState]
Absent = Mapping[str, Sequence[int]]
"""Leg -> positions of the sites that are gone when it begins, and stay away."""


def seeded_bytes(*seed: int) -> Callable[[int], bytes]:
    """Bytes that come again in every run of a test."""
    return np.random.default_rng(seed).bytes


@functools.cache
def identities(sites: int) -> tuple[ec.EllipticCurvePrivateKey, ...]:
    """Keys such as ``deal site init`` makes."""
    return tuple(ec.derive_private_key(10**9 + k, ec.SECP384R1()) for k in range(sites))


@functools.cache
def met(sites: int) -> States:
    """Sites that have met all others; in ascending order."""
    opened = [open_run(RUN, key, seeded_bytes(k)) for k, key in enumerate(identities(sites))]
    pins = {state.site: f"site {k}" for k, state in enumerate(opened)}
    announced = [state.announcement for state in opened]
    return {
        state.site: meet_peers(state, announced, pins)
        for state in sorted(opened, key=lambda each: each.site)
    }


def first(states: States, sites: int) -> dict[bytes, SiteState]:
    """The first sites of a run."""
    return dict(list(states.items())[:sites])


def integers(length: int, sites: int, bits: int = 32, largest: int = 1000) -> Layout:
    """A layout of integers."""
    return Layout((SumField("x", (length,), largest),), bits, sites)


def terms_of(states: States, layout: Layout, number: int = 1, **changed: object) -> RoundTerms:
    """The terms of a round of all these sites."""
    values = {
        "colluding": 0, "min_cohort": min(LEAST, len(states)), "bits": layout.bits,
        "length": layout.length, "layout": layout.digest, **changed,
    }  # fmt: skip
    return RoundTerms(RUN, number, tuple(states), **values)  # type: ignore[arg-type]


def vectors(states: States, layout: Layout, seed: int = 0) -> dict[bytes, Encoded]:
    """A random vector of integers at each site."""
    generator = np.random.default_rng(seed)
    most = int(layout.fields[0].largest)
    return {
        site: layout.encode({"x": generator.integers(-most, most + 1, layout.length)}, generator)
        for site in states
    }


def plain_sum(encoded: Mapping[bytes, Encoded], sites: Sequence[bytes]) -> Words:
    """What a sum without masks would be, in the ring."""
    words = [encoded[site].words for site in sites]
    return np.sum(words, axis=0, dtype=words[0].dtype)


@dataclass
class Round:
    """A round as it goes on; what the server has sent and received stays here.

    Attributes:
        states: of the sites, as they would be read from their disks.
        held: the server's own record.
        sent: (exchange, site) -> request.
        received: (exchange, site) -> reply.
        draw: site -> its random bytes; None: from the seed.
    """

    terms: RoundTerms
    states: dict[bytes, SiteState]
    encoded: Mapping[bytes, Encoded]
    absent: Absent = field(default_factory=dict)
    policy: SitePolicy = field(default_factory=lambda: SitePolicy(min_cohort=LEAST))
    seed: int = 0
    draw: Callable[[bytes], Callable[[int], bytes]] | None = None

    def __post_init__(self) -> None:
        self.held = open_round(self.terms)
        self.sent: dict[tuple[str, bytes], bytes] = {}
        self.received: dict[tuple[str, bytes], bytes] = {}
        self.gone: set[int] = set()

    def run(self, exchange: str) -> None:
        """One exchange: all who are there answer, and the server takes what they say."""
        done = DONE[exchange]
        for site in self.here(exchange):
            request = self.terms.to_bytes()
            if exchange != "prepare":
                request = getattr(server_round, f"{exchange}_request")(self.held, site)
            reply = self.reply(exchange, site, request)
            self.keep(getattr(server_round, f"add_{done}")(self.held, site, reply))
        if exchange != "unmask":
            self.keep(getattr(server_round, f"close_{done}")(self.held))

    prepare, mask = partialmethod(run, "prepare"), partialmethod(run, "mask")
    confirm, unmask = partialmethod(run, "confirm"), partialmethod(run, "unmask")

    def until(self, exchange: str) -> Round:
        """Run the exchanges before one; those who are gone when it begins are taken out."""
        for name in itertools.takewhile(lambda each: each != exchange, EXCHANGES):
            self.run(name)
        return self

    def total(self, exchange: str = "prepare") -> Words:
        """Run it all, or what is left of it from an exchange on."""
        for name in EXCHANGES[EXCHANGES.index(exchange) :]:
            self.run(name)
        return unmasked_sum(self.held)

    def forked(self, absent: Absent) -> Round:
        """A round with the same past, from which others are absent."""
        fork = copy.copy(self)
        fork.absent, fork.gone, fork.states = absent, set(self.gone), dict(self.states)
        fork.sent, fork.received = dict(self.sent), dict(self.received)
        return fork

    def here(self, exchange: str) -> list[bytes]:
        self.gone |= set(self.absent.get(exchange, ()))
        known = {"prepare": range(len(self.terms.cohort)), "mask": self.held.members}
        expected = known.get(exchange, self.held.survivors) or ()
        return [self.terms.cohort[at] for at in expected if at not in self.gone]

    def reply(self, exchange: str, site: bytes, request: bytes) -> bytes:
        """Ask one site, keep its state as its disk would."""
        state = self.states[site]
        if exchange == "prepare":
            seeded = seeded_bytes(self.seed, self.terms.number, *site[:4])
            draw = self.draw(site) if self.draw else seeded
            answer = site_round.prepare(state, request, self.policy, draw)
        elif exchange == "mask":
            answer = site_round.mask(state, request, self.encoded[site])
        else:
            answer = getattr(site_round, exchange)(state, request)
        self.states[site] = SiteState.from_bytes(answer.state.to_bytes())
        self.sent[exchange, site] = request
        self.received[exchange, site] = answer.reply
        return answer.reply

    def keep(self, held: ServerRound) -> None:
        self.held = ServerRound.from_bytes(held.to_bytes())
