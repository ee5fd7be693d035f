"""Where the server adds the noise, a client whose reply is no use adds zero: how the run ends does
not tell that it was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from deal_core.errors import UserError
from deal_core.privacy.accounting.ledger import Ledger
from tests.simulations.runs import at, learnt_adapter, no_number, run_in_process, same
from tests.sizes import TWO_LAYERS

pytestmark = pytest.mark.usefixtures("one_model")
SMALL = ("federation.clients=3", "federation.rounds=4", "train.batch_size=8", TWO_LAYERS)
ONE_DRAWN = (
    *SMALL,
    "privacy.mechanism=client",
    "privacy.trusted_server=true",
    "privacy.noise=seeded",
    "privacy.target_epsilon=50",
    "privacy.target_delta=1e-3",
    "federation.clients_per_round=1",
    'data.tasks=["laboratory"]',
)


def test_a_client_that_sends_no_number_ends_no_run_in_which_it_is_drawn_alone(
    make_experiment, tmp_path
) -> None:
    experiment = make_experiment(*ONE_DRAWN)
    events = run_in_process(at(experiment, tmp_path / "spoiled"), no_number)
    run_in_process(at(experiment, tmp_path / "honest"), lambda reply: reply)
    spoiled, honest = (
        Ledger(tmp_path / name / "privacy").events() for name in ("spoiled", "honest")
    )
    assert len(spoiled) == len(honest) == 4
    assert [e.noise_multiplier for e in spoiled] == [e.noise_multiplier for e in honest]
    unusable = [event for event in events if event["event"] == "client_failed"]
    assert unusable  # it was drawn
    assert {event["client"] for event in unusable} == {"0"}
    adapters = [learnt_adapter(tmp_path / name) for name in ("spoiled", "honest")]
    assert all(np.isfinite(part).all() for part in adapters[0].values())
    assert not same(*adapters)


def test_without_such_noise_too_few_replies_end_it(make_experiment, tmp_path) -> None:
    alone = make_experiment(*SMALL, "federation.quorum=1.0", 'data.tasks=["laboratory"]')
    with pytest.raises(UserError, match="2 of 3 clients gave a valid reply"):
        run_in_process(at(alone, tmp_path), no_number)
