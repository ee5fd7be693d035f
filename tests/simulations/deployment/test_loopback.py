"""Separate institutions on one machine: real processes, TLS, keys, three data formats. One
federation of three sites serves all checks but the first."""

import json
import re
import shutil
import subprocess
import urllib.request

import pytest

from deal_core.config.file import parse_experiment, read_toml
from deal_core.errors import UserError
from deal_core.privacy.ledger import Ledger
from server.results import read_results
from simulations.deployment.keys import make_authority
from simulations.deployment.server import submit
from simulations.deployment.server.folder import remove_site
from simulations.deployment.server.status import state_of
from simulations.deployment.site.check import check_site
from simulations.deployment.site.programs import own_app
from simulations.engines.flower import FlowerHome, program
from simulations.run.experiment import Request, load_experiment
from tests.simulations.deployment.loopback import (
    MARKER,
    ROOT,
    SITES,
    SLOW,
    alone,
    changed_app,
    divide,
    done,
    experiment_file,
    federation,
    same_adapter,
    wait_for,
)

pytestmark = pytest.mark.timeout(900 * SLOW)
SHOWN = re.compile(r"```toml\n(description = .*?)```", re.DOTALL)
SKEWED = """
import datetime
import flwr.supercore.date as date
import flwr.supernode.node_auth_http_interceptor as signing
signing.now = lambda: date.now() + datetime.timedelta(hours=1)
"""


def test_a_site_answers_over_tls_with_the_app_that_it_has_installed(tmp_path, monkeypatch):
    """Whatever the server pushes."""
    data, marker = tmp_path / "data", tmp_path / "marker"
    divide(data, {"north": ".csv"}, train=4, test=2)
    path = experiment_file(tmp_path / "one-task.toml", ["surgery"])
    pushed = changed_app(tmp_path / "harmful", MARKER.format(path=str(marker)))
    monkeypatch.setattr(submit, "BUNDLE", pushed)
    with federation(tmp_path) as fed:
        fed.add("north", data / "north", path)
        settings = fed.site("north") / "site.toml"  # no further process, which keeps the model
        settings.write_text(settings.read_text().replace("keep_seconds = 900", "keep_seconds = 0"))
        fed.start_site("north")
        fed.wait_event(fed.submit(path), "evaluated", 300)
        homes = set(marker.read_text().splitlines())
        assert homes == {str(fed.folder.flower.path)}  # the server has imported it, the site not
        (unpacked,) = (fed.site("north") / "state" / "flower" / "apps").iterdir()
        assert own_app().hash_str[:8] in unpacked.name
        assert str(marker) not in (unpacked / "deal_app.py").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    divide(folder)
    return folder


@pytest.fixture(scope="module")
def fed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("federation")
    experiment = experiment_file(path / "two-tasks.toml")
    with federation(path) as made:
        made.join(SITES, data, experiment)
        yield made


@pytest.mark.slow
def test_three_sites_learn_what_one_process_learns(fed, data):
    path = fed.path / "two-tasks.toml"
    for site in SITES:
        assert check_site(fed.site(site), load_experiment(Request(str(path)))).problems == []
    run = fed.submit(path)
    fed.wait_event(run, "run_finished", 500)
    deployed = fed.run(run)
    shown = fed.status(run)
    assert f"run {run}: finished" in shown
    assert shown.count("online") == len(SITES)
    done("report", str(deployed))
    page = (deployed / "report.html").read_text(encoding="utf-8")
    assert "– Deployment – deal" in page
    assert all(f'<th scope="row">{site}</th>' in page for site in SITES)
    here = alone(path, data, fed.path / "alone", list(SITES))
    there, alike = read_results(deployed), read_results(here)
    assert there.engine == "deployment"
    assert there.accuracy_matrix == alike.accuracy_matrix
    assert there.zero_shot == alike.zero_shot
    assert there.class_incremental == alike.class_incremental
    same_adapter(deployed, here)
    files = {path.name: path.read_bytes() for path in (deployed / "adapter").iterdir()}
    for site in SITES:
        kept = fed.site(site) / "state" / "runs" / run / "adapter"
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == files
    assert '"label"' in done("predict", str(kept), "a broken bone")


@pytest.mark.slow
def test_strangers_are_refused_and_told_why(fed, data):
    other = fed.path / "other.crt"
    other.write_bytes(make_authority().public)
    fed.make("stranger", data / "all")
    fed.make("misled", data / "all", authority=other)
    for name in ("stranger", "misled"):
        fed.start_site(name)
    assert "does not know this key" in fed.refused("stranger")
    assert "not the one that ca.crt" in fed.refused("misled")
    home = FlowerHome(fed.path / "plain")
    command = [program("flower-supernode"), "--insecure", "--superlink", fed.address]
    command += ["--host", "127.0.0.1", "--port", "0", "--max-retries", "1"]
    environment = home.environment()
    plain = subprocess.run(
        command, cwd=fed.path, env=environment, capture_output=True, timeout=90 * SLOW, check=False
    )
    assert plain.returncode != 0
    assert re.search(rb"(?i)connection|unavailable|retr", plain.stdout + plain.stderr)
    with pytest.raises(OSError, match=r"closed|reset"):
        urllib.request.urlopen(f"http://{fed.address}/health", timeout=10)
    assert len(fed.connections()) == len(SITES)


@pytest.mark.slow
def test_one_key_on_two_machines_is_one_site(fed):
    """The second is refused while the first is there, and disturbs nothing."""
    wait_for("north", lambda: "online" in fed.connections(), 60)
    shutil.copytree(fed.site("north"), fed.site("copy"), ignore=shutil.ignore_patterns("state"))
    fed.start_site("copy")
    assert "another process serves with it" in fed.refused("copy")
    path = experiment_file(fed.path / "twin.toml", ["surgery"], deadline=120)
    run = fed.submit(path, 'federation.sites=["north"]', "federation.clients=1")
    events = fed.wait_event(run, "run_finished", 300)
    assert [e["client"] for e in events if e["event"] == "client_finished"] == ["0"]
    assert not [e for e in events if e["event"] in ("client_failed", "reply_dropped")]


@pytest.mark.slow
def test_a_clock_an_hour_ahead_is_refused_at_sign_in(fed, data):
    """The real SuperNode, which signs with another time; and a key that has been removed."""
    patch = fed.path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(SKEWED)
    fed.add("late", data / "all")
    fed.start_site("late", [patch])
    assert "clock" in fed.refused("late")
    assert fed.connections()[-1] == "registered"  # never online
    remove_site(fed.folder, "late")
    fed.start_site("late")
    assert "does not know this key" in fed.refused("late")
    with pytest.raises(UserError, match="site 'late' is not registered"):
        fed.submit("quickstart", 'federation.sites=["late"]', "federation.clients=1")


@pytest.mark.slow
def test_under_the_policy_of_site_init_it_learns_with_privacy(fed, tmp_path):
    """The experiment of the docs; what was spent stands in the ledgers."""
    names, path = {"first": ".csv", "second": ".jsonl"}, tmp_path / "two-tasks.toml"
    divide(tmp_path / "data", names, train=40)
    found = SHOWN.search((ROOT / "docs" / "DEPLOYMENT.md").read_text())
    assert found is not None
    path.write_text(found[1].replace("rounds = 5", "rounds = 1"))
    asked = parse_experiment(read_toml(path), str(path))
    assert (asked.privacy.mechanism, asked.federation.rounds) == ("record", 1)
    fed.join(names, tmp_path / "data", path, policy="")
    for name in names:
        lines = check_site(fed.site(name), load_experiment(Request(str(path)))).lines
        assert any("the policy allows the experiment" in line for line in lines)
    run = fed.submit(path, f"federation.sites={json.dumps([*names])}", "federation.clients=2")
    events = fed.wait_event(run, "run_finished", 400)
    trained = [e for e in events if e["event"] == "client_finished"]
    assert len(trained) == 2 * len(names)
    assert all(0 < e["epsilon"] <= 8 and e["delta"] <= 1e-5 for e in trained)
    assert all(Ledger(fed.site(name) / "state").events() for name in names)
    assert read_results(fed.run(run)).privacy.mechanism == "record"
    assert state_of(fed.run(run)).phase == "finished"
