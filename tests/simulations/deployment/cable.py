"""A network cable between a site and the server, that can be pulled out."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.simulations.deployment.loopback import Federation, federation
from tests.simulations.deployment.site_data import SITES


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
