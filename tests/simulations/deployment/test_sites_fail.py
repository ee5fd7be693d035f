"""Sites that are slow, die or are cut off: the run goes on, and they catch up."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from simulations.deployment.server.status import state_of
from tests.simulations.deployment.loopback import SLOW, Federation, done, federation, wait_for
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import SITES, divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 * SLOW)]
NORTH, SOUTH, WEST = "0", "1", "2"


class Cable:
    """A network cable between a site and the server, that can be pulled out."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: list[socket.socket] = []
        self._whole = threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._whole.clear()
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
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


@contextmanager
def cabled(path: Path, data: Path, experiment: Path) -> Iterator[tuple[Federation, Cable]]:
    """A server and its sites, all running; the cable of the one named north can be pulled out."""
    with federation(path) as fed:
        cable = Cable(fed.folder.settings().superlink_port)
        for site in SITES:
            address = f"127.0.0.1:{cable.port}" if site == "north" else ""
            fed.add(site, data / site, experiment, address=address)
            fed.start_site(site)
        try:
            yield fed, cable
        finally:
            cable.close()


def _carry(near: socket.socket, far: socket.socket) -> None:
    """Both ways, until one end is closed."""
    with near, far:
        back = threading.Thread(target=_pump, args=(far, near), daemon=True)
        back.start()
        _pump(near, far)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def rounds_of(fed: Federation, run: str, event: str, client: str = "") -> list[int]:
    return [
        e["server_round"]
        for e in fed.events(run)
        if e["event"] == event and e.get("stage") == 0 and e.get("client", "") == client
        if e["server_round"]
    ]


def next_round(fed: Federation, run: str) -> int:
    """Wait for a round to start; its number."""
    now = max(rounds_of(fed, run, "round_started"))
    fed.wait_event(run, "round_started", 150, server_round=now + 1)
    return now + 1


def fails(fed: Federation, run: str, client: str, since: int) -> int:
    """Wait until a site has failed in a round; its number. A quick site may have answered the
    round that a fault was meant for, and fails in the next."""

    def failed() -> list[int]:
        fed.require_running(run)
        rounds = rounds_of(fed, run, "client_failed", client)
        return [number for number in rounds if number >= since]

    return int(wait_for(f"{client} fails from round {since}", failed, 150 * SLOW)[0])


def comes_back(fed: Federation, run: str, client: str, after: int) -> None:
    def back() -> bool:
        fed.require_running(run)
        return max(rounds_of(fed, run, "client_finished", client)) > after

    wait_for(f"{client} after round {after}", back, 300)


def test_a_straggler_a_dead_site_and_a_cut_cable(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data)
    path = experiment_file(tmp_path / "faults.toml", ["surgery"], rounds=99, deadline=40)
    with cabled(tmp_path, data, path) as (fed, cable):
        run = fed.submit(path, "federation.quorum=0.3")
        fed.wait_event(run, "round_finished", 240, server_round=1, clients=3)

        late = next_round(fed, run)
        fed.wait_asked("south", late)
        frozen = fed.members("south")
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        late = fails(fed, run, SOUTH, late)
        for process in frozen:
            process.send_signal(signal.SIGCONT)
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
