"""One cell of ``deal bench secure``: a whole secure sum of all sites and the server, in process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum import server_round, site_round
from deal_core.secure_sum.layout import Layout, SumField, finest_scale
from deal_core.secure_sum.server_round import ServerRound, open_round, unmasked_sum
from deal_core.secure_sum.site_state import Answer, SiteState, meet_peers, open_run
from deal_core.secure_sum.terms import RoundTerms, SitePolicy

RUN = "bench"
CLIP = 1.0
LEGS = ("encode", "prepare", "mask", "confirm", "unmask")
REPEATS = 3
"""Rounds of a cell; the median counts."""


@dataclass(frozen=True)
class SecureCase:
    """What is measured.

    Attributes:
        sites: in the cohort.
        vector_bytes: of a site's update as plain float32.
        dropped: sites that are gone between the legs ``prepare`` and ``mask``.
        bits: of a ring word.
    """

    sites: int
    vector_bytes: int
    dropped: int
    bits: int = 32


@dataclass(frozen=True)
class SecureCost:
    """What a round costs.

    Attributes:
        round_seconds: all sites and the server, one after another, on one core.
        site_seconds: leg -> mean of a site.
        server_seconds: of all legs.
        setup_seconds: of a site, once a run: its key, and all peers' announcements verified.
        bytes_up, bytes_down: of a site that stays, a round.
        setup_bytes_up, setup_bytes_down: of a site, once a run.
        exact: whether the sum is the plain one, bit for bit.
    """

    round_seconds: float
    site_seconds: Mapping[str, float]
    server_seconds: float
    setup_seconds: float
    bytes_up: float
    bytes_down: float
    setup_bytes_up: int
    setup_bytes_down: int
    exact: bool

    @property
    def masking_seconds(self) -> float:
        """All of a site's work in a round."""
        return sum(self.site_seconds.values())


@dataclass
class Clock:
    """Processor seconds by what they were spent on: the work keeps one core busy, and what else
    runs on the machine does not count."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count the block."""
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started


@dataclass
class TimedRound:
    """A round that is timed leg by leg."""

    case: SecureCase
    terms: RoundTerms
    layout: Layout
    states: dict[bytes, SiteState]
    values: Mapping[bytes, np.ndarray[Any, Any]]

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.up: list[int] = []
        self.down: list[int] = []
        self.held = open_round(self.terms)
        self.policy = SitePolicy()

    def run(self) -> bool:
        """Return whether the sum is exact."""
        generator = np.random.default_rng(self.terms.number)
        cohort = self.terms.cohort
        here = cohort[: len(cohort) - self.case.dropped]
        with self.clock.on("encode"):
            encoded = {
                site: self.layout.encode({"x": self.values[site]}, generator) for site in here
            }
        terms, legs = self.terms.to_bytes(), server_round
        self._leg(
            "prepare",
            cohort,
            lambda held, site: terms,
            legs.add_prepared,
            lambda state, request: site_round.prepare(state, request, self.policy),
        )
        self._close(legs.close_prepared)
        self._leg(
            "mask",
            here,
            legs.mask_request,
            legs.add_masked,
            lambda state, request: site_round.mask(state, request, encoded[state.site]),
        )
        self._close(legs.close_masked)
        self._leg("confirm", here, legs.confirm_request, legs.add_confirmed, site_round.confirm)
        self._close(legs.close_confirmed)
        self._leg("unmask", here, legs.unmask_request, legs.add_unmasked, site_round.unmask)
        with self.clock.on("server"):
            total = unmasked_sum(self.held)
        plain = np.sum([each.words for each in encoded.values()], axis=0, dtype=total.dtype)
        return bool(np.array_equal(total, plain))

    def _leg(
        self,
        name: str,
        sites: tuple[bytes, ...],
        ask: Callable[[ServerRound, bytes], bytes],
        add: Callable[[ServerRound, bytes, bytes], ServerRound],
        reply: Callable[[SiteState, bytes], Answer],
    ) -> None:
        for site in sites:
            with self.clock.on("server"):
                request = ask(self.held, site)
            with self.clock.on(name):
                answer = reply(self.states[site], request)
            self.states[site] = answer.state
            with self.clock.on("server"):
                self.held = add(self.held, site, answer.reply)
            if site == self.terms.cohort[0]:
                self.down.append(len(request))
                self.up.append(len(answer.reply))

    def _close(self, close: Callable[[ServerRound], ServerRound]) -> None:
        with self.clock.on("server"):
            self.held = close(self.held)


def measure_secure(case: SecureCase) -> SecureCost:
    """Return the costs of one cell, on one core."""
    clock = Clock()
    with clock.on("setup"):
        states = open_and_meet(case.sites)
    length = case.vector_bytes // 4
    layout = Layout(
        (SumField("x", (length,), CLIP, finest_scale(CLIP, case.sites, case.bits)),),
        case.bits,
        case.sites,
    )
    generator = np.random.default_rng(case.sites)
    values = {site: generator.uniform(-CLIP, CLIP, length).astype("<f4") for site in states}
    rounds = []
    for number in range(REPEATS):
        terms = RoundTerms(RUN, number, tuple(states), 0, 3, case.bits, length, layout.digest)
        timed = TimedRound(case, terms, layout, states, values)
        exact = timed.run()
        states = timed.states
        rounds.append((timed, exact))
    announced = [len(state.announcement) for state in states.values()]
    timed = rounds[-1][0]
    asked = {leg: case.sites - case.dropped if leg != "prepare" else case.sites for leg in LEGS}
    return SecureCost(
        statistics.median(sum(each.clock.seconds.values()) for each, _ in rounds),
        {
            leg: statistics.median(each.clock.seconds[leg] for each, _ in rounds) / asked[leg]
            for leg in LEGS
        },
        statistics.median(each.clock.seconds["server"] for each, _ in rounds),
        clock.seconds["setup"] / case.sites,
        sum(timed.up),
        sum(timed.down),
        announced[0],
        sum(announced[1:]),
        all(exact for _, exact in rounds),
    )


def open_and_meet(sites: int) -> dict[bytes, SiteState]:
    """Return sites with channels to all others, in ascending order."""
    opened = [open_run(RUN, ec.generate_private_key(ec.SECP384R1())) for _ in range(sites)]
    pins = {state.site: str(number) for number, state in enumerate(opened)}
    announced = [state.announcement for state in opened]
    met = [meet_peers(state, announced, pins) for state in opened]
    return {state.site: state for state in sorted(met, key=lambda each: each.site)}
