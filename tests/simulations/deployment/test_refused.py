"""Who is not registered, or not sure of the server, gets nowhere."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import urllib.request
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from simulations.deployment.keys import make_authority
from simulations.engines.flower import FlowerHome, program
from tests.simulations.deployment.loopback import deal, done, federation, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_strangers_are_refused_and_told_why(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other.crt"
    data.mkdir()
    other.write_bytes(make_authority().certificate)
    with federation(tmp_path) as fed:
        for name, authority in (("stranger", fed.folder.authority), ("misled", other)):
            done(
                *("site", "init", str(fed.site(name)), "--data", str(data), "--name", name),
                *("--server", fed.address, "--certificate", str(authority)),
            )
            assert stat.S_IMODE((fed.site(name) / "site.key").stat().st_mode) == 0o600
            fed.start_site(name)
        reasons = {"stranger": "does not know this key", "misled": "not the one that ca.crt"}
        for name, reason in reasons.items():
            process = fed.processes.pop(name)
            assert process.wait(timeout=60) == 2
            assert reason in (fed.path / f"{name}.out").read_text()
        home = FlowerHome(tmp_path / "plain")
        command = [program("flower-supernode"), "--insecure", "--superlink", fed.address]
        command += ["--host", "127.0.0.1", "--port", "0", "--max-retries", "1"]
        plain = subprocess.run(
            command,
            cwd=home.path.parent,
            env=home.environment(),
            capture_output=True,
            timeout=90,
            check=False,
        )
        assert plain.returncode != 0
        assert re.search(rb"(?i)connection|unavailable|retr", plain.stdout + plain.stderr)
        with pytest.raises(OSError, match=r"closed|reset"):
            urllib.request.urlopen(f"http://{fed.address}/health", timeout=10)
        assert fed.folder.flower.ask("supernode", "list", "deal")["nodes"] == []


def test_a_second_key_for_a_name_and_a_second_name_for_a_key_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with federation(tmp_path) as fed:
        fed.add("north", data)
        key, where = str(fed.site("north") / "site.pub"), ("--dir", str(fed.folder.path))
        again = deal("server", "add-site", "north", key, *where)
        assert again.returncode == 2
        assert "is registered already; for a new key first deal server remove-site" in again.stderr
        alias = deal("server", "add-site", "south", key, *where)
        assert "this key is that of 'north'" in alias.stderr
        private = deal("server", "add-site", "south", str(fed.site("north") / "site.key"), *where)
        assert "this is a private key, which must stay at its site" in private.stderr
        written = (fed.folder.path / "events.jsonl").read_text().splitlines()
        started, added = [json.loads(line) for line in written]
        assert (started["event"], added["event"]) == ("server_started", "site_added")
        assert added["site"] == "north"
        assert Path(key).read_text().startswith(added["key"])
        fed.start_site("north")
        wait_for("north", lambda: online(fed), 60)
        done("server", "remove-site", "north", *where)
        assert fed.names() == []
        nobody = deal("submit", "quickstart", "--set", "data.source=sites", *where)
        assert nobody.returncode == 2
        assert "no site is registered" in nobody.stderr
        assert Experiment().federation.sites == ()


def online(fed) -> bool:
    nodes = fed.folder.flower.ask("supernode", "list", "deal")["nodes"]
    return any(node["status"] == "online" for node in nodes)
