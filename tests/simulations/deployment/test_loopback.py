"""Separate institutions on one machine: real processes, TLS, keys, three data formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.results import read_results
from tests.simulations.deployment.loopback import done, federation
from tests.simulations.deployment.short_experiment import alone, experiment_file, same_adapter
from tests.simulations.deployment.site_data import SITES, divide

pytestmark = pytest.mark.timeout(900)


def test_a_site_takes_part_over_tls_and_keeps_the_adapter(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, {"north": ".csv"}, train=4, test=2)
    path = experiment_file(tmp_path / "one-task.toml", ["surgery"])
    with federation(tmp_path) as fed:
        fed.add("north", data / "north", path)
        fed.start_site("north")
        run = fed.submit(str(path))
        fed.wait_event(run, "run_finished", 300)
        kept = fed.site("north") / "state" / "runs" / run / "adapter"
        files = {path.name: path.read_bytes() for path in (fed.run(run) / "adapter").iterdir()}
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == files


@pytest.mark.slow
def test_three_sites_learn_what_one_process_learns(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data)
    path = experiment_file(tmp_path / "two-tasks.toml")
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site, path)
            done("site", "check", str(fed.site(site)), "--experiment", str(path))
            fed.start_site(site)
        run = fed.submit(str(path))
        fed.wait_event(run, "run_finished", 500)
        assert "finished" in done("status", run, "--dir", str(fed.folder.path))
        deployed = fed.run(run)
        kept = {site: fed.site(site) / "state" / "runs" / run / "adapter" for site in SITES}
    done("report", str(deployed))
    page = (deployed / "report.html").read_text(encoding="utf-8")
    assert "– Deployment – deal" in page
    assert all(f'<th scope="row">{site}</th>' in page for site in SITES)
    here = alone(path, data, tmp_path / "alone", list(SITES))
    there = read_results(deployed)
    assert there.engine == "deployment"
    assert there.accuracy_matrix == read_results(here).accuracy_matrix
    assert there.zero_shot == read_results(here).zero_shot
    assert there.class_incremental == read_results(here).class_incremental
    same_adapter(deployed, here)
    files = {path.name: path.read_bytes() for path in (deployed / "adapter").iterdir()}
    for folder in kept.values():
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    told = done("predict", str(kept["north"]), "a broken bone")
    assert '"label"' in told
