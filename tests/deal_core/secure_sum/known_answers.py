"""The round of which docs/secure-aggregation.md has the values. Run this file to print them."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum.keys import fingerprint
from deal_core.secure_sum.layout import Layout, SumField
from deal_core.secure_sum.messages import Confirmed, Masked, Prepared, Unmasked
from deal_core.secure_sum.site_state import meet_peers, open_run
from deal_core.secure_sum.terms import RoundTerms
from tests.deal_core.secure_sum.rounds import Round

RUN = "known answers"
VALUES = ([1, -2, 3, 4], [10, 20, -30, 40], [100, 200, 300, -400])
LAYOUT = Layout((SumField("x", (4,), 1000),), 32, 3)
GENERATOR = np.random.default_rng(0)


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
    number = {state.site: k for k, state in opened.items()}
    cohort = tuple(sorted(number))
    order = [number[site] for site in cohort]
    terms = RoundTerms(RUN, 7, cohort, 0, 2, 32, 4, LAYOUT.digest)
    round_ = Round(
        terms,
        {site: meet_peers(opened[number[site]], announced, None) for site in cohort},
        {site: LAYOUT.encode({"x": VALUES[number[site]]}, GENERATOR) for site in cohort},
        {"mask": [2]},
        draw=lambda site: random[number[site]],
    )
    round_.prepare()
    seeds = {number[site]: state.rounds[0] for site, state in round_.states.items()}
    total = round_.total("mask")
    said = {(exchange, number[site]): reply for (exchange, site), reply in round_.received.items()}
    prepared = {k: Prepared.from_bytes(said["prepare", k]) for k in order}
    tags = {k: Confirmed.from_bytes(said["confirm", k]).tags for k in order[:2]}
    here = order[:2]
    return {
        "run": RUN,
        "terms": terms.to_bytes().hex(),
        "context": terms.context.hex(),
        "sites": [
            {
                "identity private scalar": k + 1,
                "fingerprint": fingerprint(opened[k].site),
                "announcement sha256": hashlib.sha256(opened[k].announcement).hexdigest(),
                "channel private": opened[k].channel_private.hex(),
                "mask seed": seeds[k].mask_seed.hex(),
                "self seed": seeds[k].self_seed.hex(),
                "mask key": prepared[k].mask_key.hex(),
                "commitment": prepared[k].commitment.hex(),
                "boxes": [box.hex() for box in prepared[k].encrypted_shares],
                "values": VALUES[k],
            }
            for k in order
        ],
        "masked": [Masked.from_bytes(said["mask", k]).words.hex() for k in here],
        "tags": [[tag.hex() for tag in tags[k]] for k in here],
        "unmasked": [
            [share.hex() for share in Unmasked.from_bytes(said["unmask", k]).shares] for k in here
        ],
        "sum": LAYOUT.decode(total)["x"].tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(known_answers(), indent=1))
