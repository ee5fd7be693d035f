"""Twenty rounds, a random fault in every second one, and the end that there is without faults."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from server.results import read_results
from simulations.deployment.server.run_state import state_of
from tests.simulations.deployment.cable import Cable, cabled
from tests.simulations.deployment.loopback import SLOW, Federation, done, wait_for
from tests.simulations.deployment.short_experiment import alone, experiment_file
from tests.simulations.deployment.site_data import SITES, divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400 * SLOW)]
ROUNDS = 20
FAULTS = ("killed site", "frozen site", "cut cable", "killed server")


def at_work(fed: Federation, sites: list[str], number: int) -> str:
    """The first of the sites that is working on the round; another may still be away from the
    fault before."""
    for site in sites:
        with suppress(AssertionError):
            fed.wait_asked(site, number, 20)
            return site
    raise AssertionError(f"nobody works on round {number}")


def inject(
    fed: Federation, fault: str, sites: list[str], run: str, number: int, cable: Cable
) -> None:
    """One fault, which has passed when this returns."""
    if fault == "cut cable":
        cable.cut()
        time.sleep(20 * SLOW)
        cable.mend()
        return
    site = at_work(fed, sites, number)
    if fault == "killed site":
        fed.kill(site)
        fed.start_site(site)
    elif fault == "frozen site":
        frozen = fed.members(site)
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        time.sleep(50 * SLOW)
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    else:
        fed.kill("server")
        fed.start_server()
        done("status", run, "--dir", str(fed.folder.path))
        fed.submit("--resume", run)


def reach(fed: Federation, run: str, event: str, **fields: int) -> None:
    """Until the event has come; where no site was left, the run is continued."""
    for _ in range(4):
        try:
            fed.wait_event(run, event, 400, **fields)
            return
        except AssertionError as error:
            if "the run stopped" not in str(error):
                raise
        fed.submit("--resume", run)
    raise AssertionError("stopped again and again")


def test_a_fault_in_every_second_round(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, train=60, test=120)
    path = experiment_file(tmp_path / "twenty.toml", ["surgery"], rounds=ROUNDS, deadline=45)
    draw, injected = random.Random(20), Counter[str]()
    with cabled(tmp_path, data, path) as (fed, cable):
        run = fed.submit(str(path), "--set", "federation.quorum=0.3")
        for number in range(2, ROUNDS + 1, 2):
            reach(fed, run, "round_started", server_round=number)
            fault = draw.choice(FAULTS)
            inject(fed, fault, draw.sample(list(SITES), len(SITES)), run, number, cable)
            injected[fault] += 1
        reach(fed, run, "run_finished")
        wait_for("results", lambda: state_of(fed.run(run)).phase == "finished", 10)
        deployed = fed.run(run)
    events = fed.events(run)
    assert injected.total() == ROUNDS / 2
    assert sum(e["event"] == "client_failed" for e in events) >= 3
    undisturbed = read_results(alone(path, data, tmp_path / "alone", list(SITES)))
    disturbed = read_results(deployed)
    assert len(disturbed.aggregation_error) == ROUNDS
    print(
        dict(injected),
        "disturbed",
        disturbed.average_accuracy,
        "undisturbed",
        undisturbed.average_accuracy,
    )
    assert disturbed.average_accuracy > disturbed.zero_shot["surgery"]
    assert disturbed.average_accuracy >= undisturbed.average_accuracy - 0.01
