"""Secure sums among real processes: four sites that pin each other, one killed between two legs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from server.results import read_results
from simulations.deployment.server.status import state_of
from tests.simulations.deployment.loopback import OPEN, SLOW, done, federation
from tests.simulations.deployment.pins import pin_each_other
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 * SLOW)]

SITES = {"north": ".csv", "south": ".jsonl", "west": ".parquet", "east": ".jsonl"}
WEST = "2"
REQUIRED = OPEN + 'secure_aggregation = "required"\n'


def test_a_site_that_is_killed_after_it_has_masked_is_in_the_sum(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, SITES, train=32, test=8)
    path = experiment_file(tmp_path / "secure.toml", ["surgery"], rounds=3, deadline=60)
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site, path, policy=REQUIRED)
        pin_each_other(fed, SITES)
        for site in SITES:
            fed.start_site(site)
        run = fed.submit(
            str(path),
            *("--set", "aggregation.secure=true"),
            *("--set", "federation.quorum=0.5"),
        )
        fed.wait_event(run, "summed", 240, server_round=1, sites=4)

        fed.wait_asked("south", 2)
        frozen = fed.members("south")
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        fed.wait_event(run, "client_finished", 120, server_round=2, client=WEST)
        fed.kill("west")
        for process in frozen:
            process.send_signal(signal.SIGCONT)

        events = fed.wait_event(run, "run_finished", 400)
        said = done("status", run, "--dir", str(fed.folder.path))
    sums = {e["server_round"]: e["sites"] for e in events if e["event"] == "summed"}
    assert sums == {1: 4, 2: 4, 3: 3}
    missed = [(e["client"], e["leg"]) for e in events if e["event"] == "leg_failed"]
    assert missed == [(WEST, "confirm")]
    assert "the last sum is over 3 of" in said
    assert read_results(fed.run(run)).average_accuracy is not None
    assert state_of(fed.run(run)).phase == "finished"
    for site in SITES:
        assert not [e for e in fed.log(site) if e["event"] == "request_failed"], site
    left = {e["code"] for site in SITES for e in fed.log(site) if e["event"] == "answered"}
    assert left == {"ok"}
    print(json.dumps({"seconds": events[-1]["time"] - events[0]["time"]}))
