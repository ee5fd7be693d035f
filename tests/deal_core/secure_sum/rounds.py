"""A run among sites in one process: every record and message passes through its bytes."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum import server_round, site_round
from deal_core.secure_sum.keys import Words
from deal_core.secure_sum.layout import Encoded, Layout, SumField
from deal_core.secure_sum.server_round import ServerRound, open_round, unmasked_sum
from deal_core.secure_sum.site_state import SiteState, meet_peers, open_run
from deal_core.secure_sum.terms import RoundTerms, SitePolicy

RUN = "run-1"
LEGS = ("prepare", "mask", "confirm", "unmask")
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
        sent: (leg, site) -> request.
        received: (leg, site) -> reply.
    """

    terms: RoundTerms
    states: dict[bytes, SiteState]
    encoded: Mapping[bytes, Encoded]
    absent: Absent = field(default_factory=dict)
    policy: SitePolicy = field(default_factory=lambda: SitePolicy(min_cohort=LEAST))
    seed: int = 0

    def __post_init__(self) -> None:
        self.held = open_round(self.terms)
        self.sent: dict[tuple[str, bytes], bytes] = {}
        self.received: dict[tuple[str, bytes], bytes] = {}
        self.gone: set[int] = set()

    def prepare(self) -> None:
        for site in self.here("prepare"):
            self.reply("prepare", site, self.terms.to_bytes())
            self.take(server_round.add_prepared, "prepare", site)
        self.keep(server_round.close_prepared(self.held))

    def mask(self) -> None:
        for site in self.here("mask"):
            self.reply("mask", site, server_round.mask_request(self.held, site))
            self.take(server_round.add_masked, "mask", site)
        self.keep(server_round.close_masked(self.held))

    def confirm(self) -> None:
        for site in self.here("confirm"):
            self.reply("confirm", site, server_round.confirm_request(self.held, site))
            self.take(server_round.add_confirmed, "confirm", site)
        self.keep(server_round.close_confirmed(self.held))

    def unmask(self) -> None:
        for site in self.here("unmask"):
            self.reply("unmask", site, server_round.unmask_request(self.held, site))
            self.take(server_round.add_unmasked, "unmask", site)

    def until(self, leg: str) -> Round:
        """Run the legs before one; those who are gone when it begins are taken out."""
        for name in itertools.takewhile(lambda each: each != leg, LEGS):
            getattr(self, name)()
        return self

    def total(self, leg: str = "prepare") -> Words:
        """Run it all, or what is left of it from a leg on."""
        for name in LEGS[LEGS.index(leg) :]:
            getattr(self, name)()
        return unmasked_sum(self.held)

    def forked(self, absent: Absent) -> Round:
        """A round with the same past, from which others are absent."""
        fork = copy.copy(self)
        fork.absent, fork.gone, fork.states = absent, set(self.gone), dict(self.states)
        fork.sent, fork.received = dict(self.sent), dict(self.received)
        return fork

    def here(self, leg: str) -> list[bytes]:
        self.gone |= set(self.absent.get(leg, ()))
        known = {"prepare": range(len(self.terms.cohort)), "mask": self.held.members}
        expected = known.get(leg, self.held.survivors) or ()
        return [self.terms.cohort[at] for at in expected if at not in self.gone]

    def reply(self, leg: str, site: bytes, request: bytes) -> bytes:
        """Ask one site, keep its state as its disk would."""
        state = self.states[site]
        if leg == "prepare":
            draw = seeded_bytes(self.seed, self.terms.number, *site[:4])
            answer = site_round.prepare(state, request, self.policy, draw)
        elif leg == "mask":
            answer = site_round.mask(state, request, self.encoded[site])
        else:
            answer = getattr(site_round, leg)(state, request)
        self.states[site] = SiteState.from_bytes(answer.state.to_bytes())
        self.sent[leg, site] = request
        self.received[leg, site] = answer.reply
        return answer.reply

    def take(self, add: Callable[..., ServerRound], leg: str, site: bytes) -> None:
        self.keep(add(self.held, site, self.received[leg, site]))

    def keep(self, held: ServerRound) -> None:
        self.held = ServerRound.from_bytes(held.to_bytes())
