"""The experiment of the docs, at sites whose policy is that of ``deal site init``, untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deal_core.config.file import parse_experiment, read_toml
from deal_core.privacy.ledger import Ledger
from server.results import read_results
from simulations.deployment.site.folder import POLICY
from tests.simulations.deployment.loopback import ROOT, done, federation
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = {"north": ".csv", "south": ".jsonl"}
SHOWN = re.compile(r"```toml\n(description = .*?)```", re.DOTALL)


def test_it_learns_under_privacy_and_what_was_spent_stands_in_the_ledgers(tmp_path: Path) -> None:
    data, path = tmp_path / "data", tmp_path / "two-tasks.toml"
    divide(data, SITES, train=40)
    found = SHOWN.search((ROOT / "docs" / "DEPLOYMENT.md").read_text())
    assert found is not None
    path.write_text(found[1].replace("rounds = 5", "rounds = 2"))
    asked = parse_experiment(read_toml(path), str(path))
    assert (asked.privacy.mechanism, asked.federation.rounds) == ("record", 2)
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site, path, policy=POLICY)
            fed.start_site(site)
            said = done("site", "check", str(fed.site(site)), "--experiment", str(path))
            assert "the policy allows the experiment" in said
        run = fed.submit(str(path))
        events = fed.wait_event(run, "run_finished", 400)
        results = read_results(fed.run(run))
        ledgers = {site: Ledger(fed.site(site) / "state").events() for site in SITES}
    trained = [e for e in events if e["event"] == "client_finished"]
    assert len(trained) == 2 * 2 * len(SITES)
    assert all(0 < e["epsilon"] <= 8 and e["delta"] <= 1e-5 for e in trained)
    assert all(ledgers.values())
    assert results.privacy.mechanism == "record"
