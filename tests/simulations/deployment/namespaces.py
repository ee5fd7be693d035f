"""Run in a network namespace of its own: a server behind nginx, sites in namespaces of theirs.

``unshare -n python -m tests.simulations.deployment.namespaces FOLDER``; nothing outside of the
namespaces is touched. Exit code 0: the run has learnt what one process learns, a stranger is
refused, and the proxy shows nothing but the fleet interface.
"""

from __future__ import annotations

import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from server.results import read_results
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.server.status import state_of
from tests.simulations.deployment.loopback import Federation, done, federation, wait_for
from tests.simulations.deployment.short_experiment import alone, experiment_file, same_adapter
from tests.simulations.deployment.site_data import SITES, divide

SERVER = "10.77.{k}.1"
PORT = 9443
NGINX = """\
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {server}/nginx.conf;
}}
"""


def ip(*arguments: str, inside: int = 0) -> None:
    prefix = ["nsenter", "-t", str(inside), "-n"] if inside else []
    subprocess.run([*prefix, "ip", *arguments], check=True, timeout=30)


@contextmanager
def namespace(k: int) -> Iterator[int]:
    """A namespace with one cable to ours; its process id stands for it."""
    holder = subprocess.Popen(["unshare", "-n", "sleep", "3600"])
    try:
        own = Path("/proc/self/ns/net").readlink()
        wait_for("namespace", lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != own, 10)
        far = ("peer", "name", "cable", "netns", str(holder.pid))
        ip("link", "add", f"deal{k}", "type", "veth", *far)
        ip("addr", "add", SERVER.format(k=k) + "/24", "dev", f"deal{k}")
        ip("link", "set", f"deal{k}", "up")
        ip("link", "set", "lo", "up", inside=holder.pid)
        ip("addr", "add", f"10.77.{k}.2/24", "dev", "cable", inside=holder.pid)
        ip("link", "set", "cable", "up", inside=holder.pid)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


@contextmanager
def nginx(folder: Path, server: ServerFolder) -> Iterator[None]:
    """The proxy, with the file that ``deal server init`` has written."""
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, server=server.path))
    process = subprocess.Popen(["nginx", "-c", str(config), "-g", "daemon off;"])
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def status_of(path: str, context: ssl.SSLContext) -> int:
    url = f"https://{SERVER.format(k=1)}:{PORT}{path}"
    try:
        with urllib.request.urlopen(url, context=context, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def check_proxy(path: Path, folder: ServerFolder) -> None:
    """Only the fleet interface is there."""
    context = ssl.create_default_context(cafile=str(folder.authority))
    wait_for("nginx", lambda: (path / "nginx" / "nginx.pid").exists(), 20)
    for closed in ("/", "/health", "/docs", "/openapi.json", "/v1/control/list-runs"):
        assert status_of(closed, context) == 403, closed
    assert status_of("/v1/fleet/nothing", context) == 404


def stranger(fed: Federation, data: Path, holder: int, host: str) -> None:
    """A key that nobody has registered is refused, from behind a cable as well."""
    done(
        *("site", "init", str(fed.site("stranger")), "--data", str(data), "--name", "stranger"),
        *("--server", f"{host}:{PORT}", "--certificate", str(fed.folder.authority)),
    )
    fed.start_site("stranger", ["nsenter", "-t", str(holder), "-n"])
    assert fed.processes.pop("stranger").wait(timeout=60) == 2
    assert "does not know this key" in (fed.path / "stranger.out").read_text()


def main(path: Path) -> None:
    ip("link", "set", "lo", "up")
    data = path / "data"
    divide(data)
    experiment = experiment_file(path / "apart.toml")
    hosts = [SERVER.format(k=k) for k in range(1, len(SITES) + 1)]
    with ExitStack() as stack:
        holders = [stack.enter_context(namespace(k)) for k in range(1, len(SITES) + 1)]
        fed = stack.enter_context(federation(path, hosts, PORT))
        stack.enter_context(nginx(path / "nginx", fed.folder))
        check_proxy(path, fed.folder)
        for name, holder, host in zip(SITES, holders, hosts, strict=True):
            fed.add(name, data / name, experiment, address=f"{host}:{PORT}")
            enter = ["nsenter", "-t", str(holder), "-n"]
            done("site", "check", str(fed.site(name)), prefix=enter)
            fed.start_site(name, enter)
        stranger(fed, data / "all", holders[0], hosts[0])
        run = fed.submit(str(experiment))
        fed.wait_event(run, "run_finished", 400)
        deployed = fed.run(run)
    assert state_of(deployed).phase == "finished"
    here = alone(experiment, data, path / "alone", list(SITES))
    there, alike = read_results(deployed), read_results(here)
    assert there.accuracy_matrix == alike.accuracy_matrix
    assert there.class_incremental == alike.class_incremental
    same_adapter(deployed, here)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
