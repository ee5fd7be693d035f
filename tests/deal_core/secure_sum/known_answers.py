"""The round of which docs/secure-aggregation.md has the values. Run this file to print them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum import server_round, site_round
from deal_core.secure_sum.keys import fingerprint
from deal_core.secure_sum.layout import Layout, SumField
from deal_core.secure_sum.messages import Confirmed, Masked, Prepared, Unmasked
from deal_core.secure_sum.server_round import open_round, unmasked_sum
from deal_core.secure_sum.site_state import meet_peers, open_run
from deal_core.secure_sum.terms import RoundTerms, SitePolicy

RUN = "known answers"
VALUES = ([1, -2, 3, 4], [10, 20, -30, 40], [100, 200, 300, -400])
LAYOUT = Layout((SumField("x", (4,), 1000),), 32, 3)
POLICY = SitePolicy(min_cohort=2)


def draws(label: str) -> Callable[[int], bytes]:
    """SHA-256 of the label and a counter, block after block, each call from a new block on."""
    counter = 0

    def random_bytes(size: int) -> bytes:
        nonlocal counter
        blocks = b""
        while len(blocks) < size:
            blocks += hashlib.sha256(f"{label} {counter}".encode()).digest()
            counter += 1
        return blocks[:size]

    return random_bytes


def known_answers() -> dict[str, Any]:
    """A round of three sites, of which the last drops out after it has prepared."""
    keys = {k: ec.derive_private_key(k + 1, ec.SECP384R1()) for k in range(3)}
    random = {k: draws(f"site {k}") for k in keys}
    opened = {k: open_run(RUN, keys[k], random[k]) for k in keys}
    announced = [state.announcement for state in opened.values()]
    states = {k: meet_peers(state, announced, None) for k, state in opened.items()}
    order = sorted(states, key=lambda k: states[k].site)
    cohort = tuple(states[k].site for k in order)
    terms = RoundTerms(RUN, 7, cohort, 0, 2, 32, 4, LAYOUT.digest)
    held, answers = open_round(terms), {}
    for k in order:
        answers[k] = site_round.prepare(states[k], terms.to_bytes(), POLICY, random[k])
        held = server_round.add_prepared(held, states[k].site, answers[k].reply)
    prepared = {k: Prepared.from_bytes(answers[k].reply) for k in order}
    seeds = {k: answers[k].state.rounds[0] for k in order}
    held = server_round.close_prepared(held)
    here, generator = order[:2], np.random.default_rng(0)
    for k in here:
        encoded = LAYOUT.encode({"x": VALUES[k]}, generator)
        request = server_round.mask_request(held, states[k].site)
        answers[k] = site_round.mask(answers[k].state, request, encoded)
        held = server_round.add_masked(held, states[k].site, answers[k].reply)
    masked = {k: Masked.from_bytes(answers[k].reply).words for k in here}
    held = server_round.close_masked(held)
    for k in here:
        request = server_round.confirm_request(held, states[k].site)
        answers[k] = site_round.confirm(answers[k].state, request)
        held = server_round.add_confirmed(held, states[k].site, answers[k].reply)
    tags = {k: Confirmed.from_bytes(answers[k].reply).tags for k in here}
    held = server_round.close_confirmed(held)
    for k in here:
        request = server_round.unmask_request(held, states[k].site)
        answers[k] = site_round.unmask(answers[k].state, request)
        held = server_round.add_unmasked(held, states[k].site, answers[k].reply)
    total = unmasked_sum(held)
    return {
        "run": RUN,
        "terms": terms.to_bytes().hex(),
        "context": terms.context.hex(),
        "sites": [
            {
                "identity private scalar": k + 1,
                "fingerprint": fingerprint(states[k].site),
                "announcement sha256": hashlib.sha256(opened[k].announcement).hexdigest(),
                "channel private": states[k].channel_private.hex(),
                "mask seed": seeds[k].mask_seed.hex(),
                "self seed": seeds[k].self_seed.hex(),
                "mask key": prepared[k].mask_key.hex(),
                "commitment": prepared[k].commitment.hex(),
                "boxes": [box.hex() for box in prepared[k].encrypted_shares],
                "values": VALUES[k],
            }
            for k in order
        ],
        "masked": [masked[k].hex() for k in here],
        "tags": [[tag.hex() for tag in tags[k]] for k in here],
        "unmasked": [
            [share.hex() for share in Unmasked.from_bytes(answers[k].reply).shares] for k in here
        ],
        "sum": LAYOUT.decode(total)["x"].tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(known_answers(), indent=1))
