"""A bad day of a federation, one fault after the other: it ends with the model of a day without
any, and no site has paid twice for a round."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from server.results import read_results
from simulations.deployment import keys
from simulations.deployment.server.submit import resume
from simulations.deployment.site.folder import CONNECTED, EXPIRED
from simulations.engines.flower import members
from tests.simulations.deployment.loopback import (
    DEAL,
    SLOW,
    alone,
    divide,
    done,
    experiment_file,
    federation,
    same_adapter,
    wait_for,
)

SITES = {"north": ".csv", "south": ".jsonl"}
ROUNDS, DELTA = 10, 1e-3
PRIVATE = f"""
[privacy]
mechanism = "record"
noise = "secure"
target_delta = {DELTA}
"""
POLICY = 'mechanism = "record"\nmax_epsilon = 8.0\nmetrics = "none"\nmin_records = 1\n'
ONE_KEY = """
import os, sys

def urandom(count, drawn=os.urandom):
    noise = sys._getframe(1).f_globals.get("__name__") == "deal_core.privacy.noise"
    return bytes(count) if noise else drawn(count)

os.urandom = urandom
"""
# A site's noise has one key for all rounds: so a day without a fault has the same noise.
LONGER = (f"federation.deadline_seconds={600 * SLOW}",)


def rounds_paid(fed, name):
    return [event.server_round for event in Ledger(fed.site(name) / "state").events()]


def stopped(fed, run, times):
    """Wait until the run has stopped so often; why it did last."""

    def reasons():
        told = [str(e["reason"]) for e in fed.events(run) if e["event"] == "run_stopped"]
        return told if len(told) >= times else []

    return str(wait_for(f"stop {times}", reasons, 240)[-1])


def late_site(fed, run):
    """It pays for an answer that comes too late, and gives the same one when it is asked again."""
    fed.wait_asked("south", 2)
    frozen = fed.members("south")
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    fed.wait_event(run, "client_failed", 240, server_round=2)
    for process in frozen:
        process.send_signal(signal.SIGCONT)
    said = stopped(fed, run, 1)
    assert "the quorum is 2" in said
    assert "south answered" in said
    fed.wait_asked("south", 2, "answered")
    assert rounds_paid(fed, "south") == [1, 2]


def full_disk(fed, run):
    """A site that can write no byte of its ledger answers nothing, and has paid nothing."""
    processes = members(fed.site("north") / "state" / "flower")
    limits = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    for process, (_, most) in zip(processes, limits, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (1, most))
    assert "the quorum is 2" in stopped(fed, run, 2)
    before = rounds_paid(fed, "north")
    failed = [e for e in fed.events(run) if e["event"] == "client_failed"][-1]
    assert failed["client"] == "0"
    assert failed["server_round"] not in before
    for process, limit in zip(processes, limits, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, limit)


def expired_certificate(fed, monkeypatch):
    """The server says so, and so does a site's check; sites come back by themselves when it has a
    new one by the same authority."""
    folder, valid = fed.folder, keys.SERVER_DAYS
    authority = keys.KeyPair(folder.authority_key.read_bytes(), folder.authority.read_bytes())
    for days in (0, valid):
        fed.kill("server")
        monkeypatch.setattr(keys, "SERVER_DAYS", days)
        pair = keys.make_server_certificate(authority, ["127.0.0.1", "localhost"])
        folder.key.write_bytes(pair.private)
        folder.certificate.write_bytes(pair.public)
        seen = {name: len(supernode_log(fed, name)) for name in SITES}
        fed.start_server()
        wait_for_sites(fed, CONNECTED if days else EXPIRED, seen)
        site = [*DEAL, "site", "check", str(fed.site("north"))]
        checked = subprocess.run(site, capture_output=True, text=True, check=False)
        found = (checked.returncode, "certificate has expired" in checked.stdout)
        assert found == ((2, True) if days == 0 else (0, False)), checked.stdout + checked.stderr
    assert f"{folder.certificate}: expired on " in (fed.path / "server.out").read_text()


def supernode_log(fed, name):
    return (fed.site(name) / "state" / "supernode.log").read_text()


def wait_for_sites(fed, sign, seen):
    """Until the log of each site has the words, beyond what was seen of it."""

    def said():
        return all(sign in supernode_log(fed, name)[start:] for name, start in seen.items())

    wait_for(sign, said, 240)


def lost_server(fed, run, backup):
    """It is killed while it waits for sites, its folder is lost, and an older copy put back: sites
    are asked again for what they have answered."""
    resume(fed.folder, run, LONGER)
    paid = rounds_paid(fed, "north")[-1]
    fed.wait_asked("north", paid + 1, "answered")
    fed.kill("server")
    shutil.rmtree(fed.folder.path)
    shutil.copytree(backup, fed.folder.path)
    fed.start_server()
    resume(fed.folder, run, LONGER)


@pytest.mark.slow
@pytest.mark.timeout(1500 * SLOW)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits files of a process")
def test_a_bad_day_ends_with_the_model_of_a_good_one_and_no_epsilon_is_spent_twice(
    tmp_path, monkeypatch
):
    data, one_key, backup = tmp_path / "data", tmp_path / "one-key", tmp_path / "backup"
    divide(data, SITES)
    one_key.mkdir()
    (one_key / "sitecustomize.py").write_text(ONE_KEY)
    path = experiment_file(tmp_path / "bad.toml", ["surgery"], rounds=ROUNDS, deadline=45)
    path.write_text(path.read_text().replace("[run]", f"{PRIVATE}[run]"))
    with federation(tmp_path) as fed:
        for name in SITES:
            fed.add(name, data / name, path, policy=POLICY)
            fed.start_site(name, [one_key])
        run = fed.submit(path, "federation.quorum=1.0")
        fed.wait_event(run, "round_finished", 240, server_round=1)
        late_site(fed, run)
        done("server", "backup", str(backup), "--dir", str(fed.folder.path))
        resume(fed.folder, run, LONGER)
        fed.wait_event(run, "round_finished", 240, server_round=2)
        full_disk(fed, run)
        expired_certificate(fed, monkeypatch)
        lost_server(fed, run, backup)
        fed.wait_event(run, "run_finished", 400)
        books = {name: Ledger(fed.site(name) / "state").events() for name in SITES}
    for name, book in books.items():
        assert [event.server_round for event in book] == [*range(1, ROUNDS + 1)], name
    spent = read_results(fed.run(run)).privacy.epsilon.values()
    assert sorted(spent) == pytest.approx(sorted(composed(each, DELTA) for each in books.values()))
    monkeypatch.setattr(os, "urandom", os.urandom)  # is put back at the end
    exec(ONE_KEY)
    same_adapter(fed.run(run), alone(path, data, tmp_path / "alone", list(SITES)))
