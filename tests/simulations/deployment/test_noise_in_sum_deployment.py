"""Noise in the sum among real processes: three sites whose shares of the noise leave masked."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from deal_core.protection import common_noise_multiplier
from server.results import read_results
from tests.simulations.deployment.loopback import SLOW, done, federation
from tests.simulations.deployment.pins import pin_each_other
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import divide
from tests.simulations.runs import IN_SUM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 * SLOW)]

SITES = {"north": ".csv", "south": ".jsonl", "west": ".parquet"}
POLICY = """\
mechanism = "record"
max_epsilon = 8.0
metrics = "none"
min_records = 1
secure_aggregation = "required"
noise_share = "sum"
"""
PRIVATE = [word for word in IN_SUM if not word.startswith("federation.")]
ROUNDS = 2


def test_every_site_pays_for_its_rounds_and_epsilon_is_that_of_its_ledger(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, SITES, train=24, test=6)
    path = experiment_file(tmp_path / "private.toml", ["surgery"], rounds=ROUNDS, deadline=120)
    sets = PRIVATE
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site, path, policy=POLICY)
        pin_each_other(fed, SITES)
        for site in SITES:
            fed.start_site(site)
        run = fed.submit(str(path), *(word for each in sets for word in ("--set", each)))
        events = fed.wait_event(run, "run_finished", 600)
        said = done("status", run, "--dir", str(fed.folder.path))
    sums = [e["sites"] for e in events if e["event"] == "summed"]
    assert sums == [len(SITES)] * ROUNDS
    assert not [e for e in events if e["event"] in ("round_lost", "leg_failed")]

    results = read_results(fed.run(run))
    asked = parse_experiment(apply_overrides(read_toml(path), sets), str(path))
    assert not results.privacy.simulation_only
    assert sorted(results.privacy.epsilon) == [str(k) for k in range(len(SITES))]
    books = [Ledger(fed.site(site) / "state").events() for site in SITES]
    for book in books:
        assert [(e.task, e.server_round, e.steps) for e in book] == [
            ("surgery", number, 1) for number in range(1, ROUNDS + 1)
        ]
        assert {e.noise_multiplier for e in book} == {common_noise_multiplier(asked, 1)}
        assert not any(e.simulation_only for e in book)
    held = sorted(composed(book, asked.privacy.target_delta) for book in books)
    assert sorted(results.privacy.epsilon.values()) == pytest.approx(held, rel=1e-9)
    assert 7.9 < held[0] <= held[-1] <= 8.0
    assert "whom ε counts on: all sites but 1" in said
    assert "may pool what they know with the server" in results.privacy.assumes
