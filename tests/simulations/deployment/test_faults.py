"""Sites and a server that are slow, die or are cut off, with and without secure sums: the run goes
on, and they catch up."""

import socket
import threading
import time
from contextlib import closing, suppress

import pytest

from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from deal_core.protection import common_noise_multiplier
from server.results import read_results
from simulations.deployment.server.status import state_of
from simulations.deployment.server.submit import resume
from tests.simulations.deployment.loopback import (
    OPEN,
    SITES,
    SLOW,
    alone,
    divide,
    done,
    experiment_file,
    federation,
    same_adapter,
    wait_for,
)
from tests.simulations.runs import IN_SUM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 * SLOW)]
NORTH, SOUTH, WEST = "0", "1", "2"
TWO = {"north": ".csv", "south": ".jsonl"}
FOUR = {**SITES, "east": ".jsonl"}
REQUIRED = 'secure_aggregation = "required"\n'
PRIVATE = f"""\
mechanism = "record"
max_epsilon = 8.0
metrics = "none"
min_records = 1
noise_share = "sum"
{REQUIRED}"""
ROUNDS = 2


class Cable:
    """A network cable between a site and the server, that can be pulled out."""

    def __init__(self, port):
        self._target = port
        self._open = []
        self._whole = threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        self._whole.clear()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def mend(self):
        self._whole.set()

    def close(self):
        self.cut()
        self._listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._whole.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._open += [near, far]
            threading.Thread(target=_carry, args=(near, far), daemon=True).start()


def _carry(near, far):
    """Both ways, until one end is closed."""
    with near, far:
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join()


def _pump(source, target):
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def rounds_of(fed, run, event, client=""):
    return [
        e["server_round"]
        for e in fed.events(run)
        if e["event"] == event and e.get("stage") == 0 and e.get("client", "") == client
        if e["server_round"]
    ]


def next_round(fed, run):
    """Wait for a round to start; its number."""
    now = max(rounds_of(fed, run, "round_started"))
    fed.wait_event(run, "round_started", 150, server_round=now + 1)
    return now + 1


def fails(fed, run, client, since):
    """Wait until a site has failed in a round; its number. A quick site may have answered the
    round that a fault was meant for, and fails in the next."""

    def failed():
        fed.require_running(run)
        rounds = rounds_of(fed, run, "client_failed", client)
        return [number for number in rounds if number >= since]

    return int(wait_for(f"{client} fails from round {since}", failed, 150 * SLOW)[0])


def comes_back(fed, run, client, after):
    def back():
        fed.require_running(run)
        return max(rounds_of(fed, run, "client_finished", client)) > after

    wait_for(f"{client} after round {after}", back, 300)


def test_a_straggler_a_dead_site_and_a_cut_cable(tmp_path):
    data = tmp_path / "data"
    divide(data)
    path = experiment_file(tmp_path / "faults.toml", ["surgery"], rounds=99, deadline=40)
    with federation(tmp_path) as fed, closing(Cable(fed.port)) as cable:
        fed.join(["north"], data, path, address=f"127.0.0.1:{cable.port}")
        fed.join(["south", "west"], data, path)
        run = fed.submit(path, "federation.quorum=0.3")
        fed.wait_event(run, "round_finished", 240, server_round=1, clients=3)

        late = next_round(fed, run)
        fed.wait_asked("south", late)
        with fed.frozen("south"):
            late = fails(fed, run, SOUTH, late)
        comes_back(fed, run, SOUTH, late)

        died = next_round(fed, run)
        fed.wait_asked("west", died)
        fed.kill("west")
        fed.start_site("west")
        comes_back(fed, run, WEST, fails(fed, run, WEST, died))

        cut = next_round(fed, run)
        cable.cut()
        time.sleep(60 * SLOW)
        cable.mend()
        comes_back(fed, run, NORTH, fails(fed, run, NORTH, cut))

        fed.wait_event(run, "round_finished", 120, server_round=next_round(fed, run))
        seen = done("stop", run, "--dir", str(fed.folder.path))
        assert f"deal submit --resume {run}" in seen
        where = ("--dir", str(fed.folder.path))
        wait_for("stopped", lambda: f"{run}: stopped" in done("status", run, *where), 60)
        assert state_of(fed.run(run)).phase != "finished"
        verdicts = {
            client: sorted(
                rounds_of(fed, run, "client_finished", client)
                + rounds_of(fed, run, "client_failed", client)
            )
            for client in (NORTH, SOUTH, WEST)
        }
        finished = rounds_of(fed, run, "round_finished")
    for client, rounds in verdicts.items():  # one verdict a round, never two
        assert rounds[: len(finished)] == finished, client


def test_a_killed_server_and_lost_sites_change_nothing_of_the_result(tmp_path):
    data = tmp_path / "data"
    divide(data, TWO)
    path = experiment_file(tmp_path / "resumed.toml", ["surgery"], rounds=4, deadline=90)
    with federation(tmp_path) as fed:
        where = ("--dir", str(fed.folder.path))
        fed.join(TWO, data, path)
        run = fed.submit(path, "federation.quorum=1.0")

        fed.wait_asked("north", 2, event="answered")
        fed.kill("server")
        kept = fed.site("north") / "state" / "runs" / run / "update-0-2.safetensors"
        when = kept.stat().st_mtime_ns
        fed.start_server()
        assert f"run {run}: stopped (its process has ended" in done("status", run, *where)
        resume(fed.folder, run)

        fed.wait_event(run, "round_started", 120, server_round=3)
        assert kept.stat().st_mtime_ns == when  # asked twice, answered once
        for site in TWO:
            fed.kill(site)
        events = fed.wait_event(run, "run_stopped", 240)
        assert "the quorum is 2" in events[-1]["reason"]
        seen = done("status", run, *where)
        assert f"run {run}: stopped" in seen
        assert f"deal submit --resume {run}" in seen
        assert state_of(fed.run(run)).phase == "stopped"

        for site in TWO:
            fed.start_site(site)
        resume(fed.folder, run)
        fed.wait_event(run, "run_finished", 300)
        deployed = fed.run(run)
    same_adapter(deployed, alone(path, data, tmp_path / "alone", list(TWO)))


def test_a_site_that_is_killed_after_it_has_masked_is_in_the_sum(tmp_path):
    data = tmp_path / "data"
    divide(data, FOUR, train=32, test=8)
    path = experiment_file(tmp_path / "secure.toml", ["surgery"], rounds=3, deadline=60)
    with federation(tmp_path) as fed:
        fed.join(FOUR, data, path, pinned=True, policy=OPEN + REQUIRED)
        run = fed.submit(path, "aggregation.secure=true", "federation.quorum=0.5")
        fed.wait_event(run, "summed", 240, server_round=1, sites=4)

        fed.wait_asked("south", 2)
        with fed.frozen("south"):
            fed.wait_event(run, "client_finished", 120, server_round=2, client=WEST)
            fed.kill("west")

        events = fed.wait_event(run, "run_finished", 400)
        said = done("status", run, "--dir", str(fed.folder.path))
    sums = {e["server_round"]: e["sites"] for e in events if e["event"] == "summed"}
    assert sums == {1: 4, 2: 4, 3: 3}
    missed = [(e["client"], e["exchange"]) for e in events if e["event"] == "exchange_failed"]
    assert missed == [(WEST, "confirm")]
    assert "the last sum is over 3 of" in said
    assert read_results(fed.run(run)).average_accuracy is not None
    assert state_of(fed.run(run)).phase == "finished"
    for site in FOUR:
        assert not [e for e in fed.log(site) if e["event"] == "request_failed"], site
    left = {e["code"] for site in FOUR for e in fed.log(site) if e["event"] == "answered"}
    assert left == {"ok"}


def test_every_site_pays_for_its_rounds_and_epsilon_is_that_of_its_ledger(tmp_path):
    data = tmp_path / "data"
    divide(data, SITES, train=24, test=6)
    path = experiment_file(tmp_path / "private.toml", ["surgery"], rounds=ROUNDS, deadline=120)
    private = [word for word in IN_SUM if not word.startswith("federation.")]
    with federation(tmp_path) as fed:
        fed.join(SITES, data, path, pinned=True, policy=PRIVATE)
        run = fed.submit(path, *private)
        events = fed.wait_event(run, "run_finished", 600)
    sums = [e["sites"] for e in events if e["event"] == "summed"]
    assert sums == [len(SITES)] * ROUNDS
    assert not [e for e in events if e["event"] in ("round_lost", "exchange_failed")]

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
