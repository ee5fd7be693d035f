"""Identity at the edges: a clock that is wrong, and one key on two machines."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from simulations.engines.flower import stop_all
from tests.simulations.deployment.loopback import DEAL, ROOT, federation, wait_for
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SKEWED = """
import datetime
import flwr.supercore.date as date
import flwr.supernode.node_auth_http_interceptor as signing
signing.now = lambda: date.now() + datetime.timedelta(hours=1)
"""


def test_a_clock_an_hour_ahead_is_refused_at_sign_in(tmp_path: Path) -> None:
    """The real SuperNode, which signs with another time."""
    data = tmp_path / "data"
    data.mkdir()
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(SKEWED)
    with federation(tmp_path) as fed:
        fed.add("north", data)
        home = fed.site("north") / "state" / "flower"
        try:
            ended = subprocess.run(
                [*DEAL, "site", "start", str(fed.site("north"))],
                env={**os.environ, "PYTHONPATH": f"{patch}{os.pathsep}{ROOT}"},
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
            )
        finally:
            stop_all(home)
        assert ended.returncode == 2
        assert "clock" in ended.stderr
        nodes = fed.folder.flower.ask("supernode", "list", "deal")["nodes"]
        assert [node["status"] for node in nodes] == ["registered"]


def test_one_key_on_two_machines_is_one_site(tmp_path: Path) -> None:
    """The second is refused while the first is there, and disturbs nothing."""
    data = tmp_path / "data"
    divide(data, {"north": ".csv"})
    path = experiment_file(tmp_path / "twin.toml", ["surgery"], deadline=120)
    with federation(tmp_path) as fed:
        fed.add("north", data / "north", path)
        shutil.copytree(fed.site("north"), fed.site("copy"))
        fed.start_site("north")
        wait_for("north", lambda: "online" in status(fed), 60)
        fed.start_site("copy")
        assert fed.processes.pop("copy").wait(timeout=60) == 2
        assert "another process serves with it" in (fed.path / "copy.out").read_text()
        run = fed.submit(str(path))
        events = fed.wait_event(run, "run_finished", 300)
    assert [e["client"] for e in events if e["event"] == "client_finished"] == ["0"]
    assert not [e for e in events if e["event"] in ("client_failed", "reply_dropped")]


def status(fed) -> list[str]:
    return [n["status"] for n in fed.folder.flower.ask("supernode", "list", "deal")["nodes"]]
