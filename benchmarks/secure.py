"""Seconds and bytes of secure sums by sites and size: all sites and the server in one process, in
processor seconds, the median of three rounds. The protocol: docs/secure-aggregation.md."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum import server_round as server
from deal_core.secure_sum import site_round as site
from deal_core.secure_sum.layout import Encoded, Layout, SumField, finest_scale
from deal_core.secure_sum.site_state import SiteState, meet_peers, open_run
from deal_core.secure_sum.terms import RoundTerms, SitePolicy
from measuring import Figures, Row

EXCHANGES: tuple[tuple[str, Any, Any, Any, Any], ...] = (
    ("prepare", None, site.prepare, server.add_prepared, server.close_prepared),
    ("mask", server.mask_request, site.mask, server.add_masked, server.close_masked),
    ("confirm", server.confirm_request, site.confirm, server.add_confirmed, server.close_confirmed),
    ("unmask", server.unmask_request, site.unmask, server.add_unmasked, server.unmasked_sum),
)
"""Name, request (of the first: the terms), a site's answer, and what the server does with each
answer and with all of them."""
COHORTS = ((10, 0), (30, 0), (100, 0), (10, 3), (30, 10), (100, 33))
SIZES = {
    "small": ((4, 1, 32),),
    "usual": ((10, 0, 32), (30, 0, 32), (10, 3, 32)),
    "full": tuple((*cohort, bits) for bits in (32, 64) for cohort in COHORTS),
}
"""Sites, sites that are gone before they mask, and bits of a word."""
UPDATE_BYTES = 1 << 20
"""Of a site, as float32."""


class Clock(defaultdict[str, float]):
    """Processor seconds, and bytes, by what they were spent on."""

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on the account of a name."""
        started = time.process_time()
        found = function(*arguments)
        self[name] += time.process_time() - started
        return found


def opened(sites: int) -> dict[bytes, SiteState]:
    """Return sites that have met: once a run."""
    own = [open_run("bench", ec.generate_private_key(ec.SECP384R1())) for _ in range(sites)]
    pins = {state.site: str(number) for number, state in enumerate(own)}
    announced = [state.announcement for state in own]
    met = [meet_peers(state, announced, pins) for state in own]
    return {state.site: state for state in sorted(met, key=lambda each: each.site)}


def one_round(
    states: dict[bytes, SiteState], terms: RoundTerms, words: dict[bytes, Encoded], clock: Clock
) -> bool:
    """Return whether the sum is exact, bit for bit. Bytes are those of the first site."""
    held: Any = server.open_round(terms)
    for exchange, ask, reply, add, close in EXCHANGES:
        for name in terms.cohort if exchange == "prepare" else words:
            request = clock.call("server", ask, held, name) if ask else terms.to_bytes()
            more: list[Any] = [SitePolicy()] if exchange == "prepare" else []
            if exchange == "mask":
                more = [words.get(name)]
            answer = clock.call(exchange, reply, states[name], request, *more)
            states[name] = answer.state
            held = clock.call("server", add, held, name, answer.reply)
            if name == terms.cohort[0]:
                clock["down"] += len(request)
                clock["up"] += len(answer.reply)
        held = clock.call("server", close, held)
    plain = np.sum([each.words for each in words.values()], axis=0, dtype=held.dtype)
    return bool(np.array_equal(held, plain))


def measure(sites: int, gone: int, bits: int) -> Row:
    """Return the figures of a line."""
    setup, length = Clock(float), UPDATE_BYTES // 4
    states = setup.call("setup", opened, sites)
    cohort = tuple(states)
    field = SumField("x", (length,), 1.0, finest_scale(1.0, sites, bits))
    layout, generator = Layout((field,), bits, sites), np.random.default_rng(sites)
    values = {s: generator.uniform(-1, 1, length).astype("<f4") for s in cohort[: sites - gone]}
    clocks, exact = [Clock(float) for _ in range(3)], True
    for number, clock in enumerate(clocks):
        encode = partial(clock.call, "encode", layout.encode)
        words = {s: encode({"x": value}, generator) for s, value in values.items()}
        terms = RoundTerms("bench", number, cohort, 0, 3, bits, length, layout.digest)
        exact &= one_round(states, terms, words, clock)
    spent = {name: median(clock[name] for clock in clocks) for name in clocks[0]}
    at_sites = {exchange: spent[exchange] for exchange in ("encode", "mask", "confirm", "unmask")}
    own = sum(at_sites.values()) / len(values) + spent["prepare"] / sites
    return {
        "sites": sites,
        "gone": gone,
        "bits": bits,
        "up, times plain": spent["up"] / UPDATE_BYTES,
        "down, kB": spent["down"] / 1e3,
        "site, ms": 1e3 * own,
        "of it masking": 1e3 * spent["mask"] / len(values),
        "server, s": spent["server"],
        "round, s": sum(at_sites.values()) + spent["prepare"] + spent["server"],
        "setup of a site, ms": 1e3 * setup["setup"] / sites,
        "exact": exact,
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure all sizes and show them."""
    figures = Figures("secure", __doc__, given)
    figures.add("Secure sums", [measure(*size) for size in SIZES[figures.size]])


if __name__ == "__main__":
    main()
