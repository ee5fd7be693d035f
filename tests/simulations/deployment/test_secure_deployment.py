"""Secure sums among real processes that pin each other: a site killed between two legs, and noise
whose shares leave masked."""

from __future__ import annotations

import signal
from collections.abc import Collection
from pathlib import Path

import pytest

from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from deal_core.protection import common_noise_multiplier
from server.results import read_results
from simulations.deployment.keys import fingerprint_of_line, read_public_key
from simulations.deployment.server.status import state_of
from simulations.deployment.site.check import check_site
from tests.simulations.deployment.loopback import OPEN, SLOW, Federation, done, federation
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import SITES, divide
from tests.simulations.runs import IN_SUM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 * SLOW)]

FOUR = {**SITES, "east": ".jsonl"}
WEST = "2"
REQUIRED = 'secure_aggregation = "required"\n'
PRIVATE = f"""\
mechanism = "record"
max_epsilon = 8.0
metrics = "none"
min_records = 1
noise_share = "sum"
{REQUIRED}"""
ROUNDS = 2


def pin_each_other(fed: Federation, names: Collection[str]) -> None:
    """As if each institution had read out its fingerprint, which the server shows as well."""
    shown = {
        name: fingerprint_of_line(read_public_key(fed.site(name) / "site.pub")) for name in names
    }
    for name in names:
        others = "".join(f'{peer} = "{shown[peer]}"\n' for peer in names if peer != name)
        path = fed.site(name) / "site.toml"
        path.write_text(path.read_text().replace("[policy]", f"[peers]\n{others}\n[policy]", 1))
        checked = "\n".join(check_site(fed.site(name), offline=True).lines)
        assert f"read out by telephone: {shown[name]}" in checked
        assert "secure sums: required by the policy, with" in checked


def test_a_site_that_is_killed_after_it_has_masked_is_in_the_sum(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, FOUR, train=32, test=8)
    path = experiment_file(tmp_path / "secure.toml", ["surgery"], rounds=3, deadline=60)
    with federation(tmp_path) as fed:
        for site in FOUR:
            fed.add(site, data / site, path, policy=OPEN + REQUIRED)
        pin_each_other(fed, FOUR)
        for site in FOUR:
            fed.start_site(site)
        run = fed.submit(path, "aggregation.secure=true", "federation.quorum=0.5")
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
    for site in FOUR:
        assert not [e for e in fed.log(site) if e["event"] == "request_failed"], site
    left = {e["code"] for site in FOUR for e in fed.log(site) if e["event"] == "answered"}
    assert left == {"ok"}


def test_every_site_pays_for_its_rounds_and_epsilon_is_that_of_its_ledger(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, SITES, train=24, test=6)
    path = experiment_file(tmp_path / "private.toml", ["surgery"], rounds=ROUNDS, deadline=120)
    private = [word for word in IN_SUM if not word.startswith("federation.")]
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site, path, policy=PRIVATE)
        pin_each_other(fed, SITES)
        for site in SITES:
            fed.start_site(site)
        run = fed.submit(path, *private)
        events = fed.wait_event(run, "run_finished", 600)
    sums = [e["sites"] for e in events if e["event"] == "summed"]
    assert sums == [len(SITES)] * ROUNDS
    assert not [e for e in events if e["event"] in ("round_lost", "leg_failed")]

    results = read_results(fed.run(run))
    asked = parse_experiment(apply_overrides(read_toml(path), private), str(path))
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
    assert "may pool what they know with the server" in results.privacy.assumes
