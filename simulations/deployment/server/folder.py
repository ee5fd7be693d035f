"""The server: its folder and settings, ``deal server init``, which fills it, ``deal server start``,
which runs Flower's SuperLink with TLS and a lasting memory, its backup, and who may sign in
there."""

import ipaddress
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field

from client.site_file import NAME
from deal_core.atomic_write import atomic_write
from deal_core.config.data import Table
from deal_core.config.file import parse_tables, read_toml
from deal_core.errors import UserError, at_home
from server.folder import EventLog
from simulations.deployment import keys, service
from simulations.engines.flower import CONNECTION, LOCAL, FlowerHome, program
from simulations.output import toml_lines

HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")
WAIT_SECONDS = 60.0
"""For a command that changes the list of sites at the same time."""


class ServerSettings(Table):
    """``server.toml``."""

    hosts: tuple[str, ...] = Field(min_length=1)
    """Host names and addresses under which sites reach the server; its certificate names them."""
    port: int = Field(9443, ge=1, le=65535)
    """What the reverse proxy listens on, for the sites."""
    superlink_port: int = Field(9444, ge=1, le=65535)
    """What the SuperLink listens on, on this machine alone: who reaches it can start runs."""

    @property
    def address(self) -> str:
        """Where the proxy listens: the address for sites on other machines."""
        return f"{self.hosts[0]}:{self.port}"

    @property
    def local_address(self) -> str:
        """Where the SuperLink listens: the address for sites on this machine, without a proxy."""
        return f"localhost:{self.superlink_port}"


class ServerFolder:
    """Names inside it."""

    def __init__(self, path: str | Path) -> None:
        self.path = at_home(path).resolve()
        self.settings_file = self.path / "server.toml"
        self.authority = self.path / "ca.crt"  # every site needs it
        self.authority_key = self.path / "ca.key"  # for a new server certificate; kept elsewhere
        self.certificate = self.path / "server.crt"
        self.key = self.path / "server.key"
        self.database = self.path / "superlink.db"  # the SuperLink's: registered keys and runs
        self.sites = self.path / "sites.json"
        self.runs = self.path / "runs"
        self.events = EventLog(self.path / "events.jsonl")  # of sites and runs
        self.log = self.path / "superlink.log"
        self.pid = self.path / "server.pid"
        self.flower = FlowerHome(self.path / "flower")

    def settings(self) -> ServerSettings:
        """Return ``server.toml``; UserError: there is none, or a key of it is wrong."""
        if not self.settings_file.is_file():
            raise UserError(
                f"{self.path}: no server.toml; make one with deal server init, or name the "
                "server's folder with --dir"
            )
        where = str(self.settings_file)
        return parse_tables(ServerSettings, read_toml(self.settings_file), where)

    def command(self, words: str) -> str:
        """Return ``deal WORDS`` for this server, from any working directory: with ``--dir``."""
        return f"deal {words} --dir {shlex.quote(str(self.path))}"


def init_server(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Fill an empty or missing folder; return the lines to print. UserError: it cannot be."""
    for host in settings.hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not HOST.fullmatch(host):
                raise UserError(
                    f"--host {host}: neither a host name nor an address; give it without port"
                ) from None
    if settings.port == settings.superlink_port:
        raise UserError("--port and --superlink-port must differ: the proxy stands before the link")
    if folder.settings_file.exists() or folder.authority_key.exists():
        raise UserError(f"{folder.path}: holds a server already; choose another folder")
    if "$" in str(folder.path):
        raise UserError(f"{folder.path}: nginx takes no path with $; choose another folder")
    proxy = service.filled(
        "nginx.conf",
        port=settings.port,
        names=" ".join(settings.hosts),
        certificate=service.quoted(folder.certificate),
        key=service.quoted(folder.key),
        authority=service.quoted(folder.authority),
        superlink_port=settings.superlink_port,
    )
    authority = keys.make_authority()
    # The server itself, and its proxy, reach the SuperLink by its local address.
    hosts = list(dict.fromkeys([*settings.hosts, LOCAL, "localhost"]))
    server = keys.make_server_certificate(authority, hosts)
    fixed = (folder.settings_file, folder.authority, folder.certificate, folder.key)
    try:
        folder.runs.mkdir(parents=True, exist_ok=True)
        folder.path.chmod(0o700)
        keys.write_secret(folder.authority_key, authority.private)
        keys.write_secret(folder.key, server.private)
        folder.authority.write_bytes(authority.public)
        folder.certificate.write_bytes(server.public)
        folder.flower.connect(f"{LOCAL}:{settings.superlink_port}", folder.authority)
        folder.sites.write_text("{}\n", encoding="utf-8")
        (folder.path / "nginx.conf").write_text(proxy, encoding="utf-8")
        unit = service.unit("server", folder.path, fixed, folder.path)
        (folder.path / "deal-server.service").write_text(unit, encoding="utf-8")
        folder.settings_file.write_text(toml_lines(settings.model_dump()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be written ({error.strerror})") from None
    return [
        f"made {folder.path}: certificates for {', '.join(settings.hosts)}, server.toml, "
        "nginx.conf, deal-server.service",
        "next:",
        f"  1. include {folder.path / 'nginx.conf'} in your reverse proxy (port {settings.port})",
        f"  2. deal server start {folder.path}        (or install deal-server.service)",
        f"  3. send {folder.authority} and the address {settings.address} to every site",
        f"  4. for each key that comes back: {folder.command('server add-site NAME KEY.pub')}",
        f"  without a proxy, for sites on this machine alone: leave out 1; their address is "
        f"{settings.local_address}",
        f"  keep {folder.authority_key.name} offline: it is needed for a new certificate only",
    ]


def start_server(folder: ServerFolder) -> None:
    """Run the SuperLink, for this machine alone, until it is asked to end. UserError: it cannot."""
    settings = folder.settings()
    keys.check_secret(folder.key)
    service.require_idle(folder.pid, settings.superlink_port)
    for line in keys.expiring(folder.certificate, folder.authority):
        print(f"warning: {line}")
    print(
        f"SuperLink on {LOCAL}:{settings.superlink_port}, log in {folder.log}; Ctrl-C ends it\n"
        f"sites on this machine reach it at {settings.local_address}, without a proxy; others at "
        f"{settings.address}, where the proxy listens (nginx.conf)\n"
        "next, in another terminal, for each site: "
        f"{folder.command('server add-site NAME KEY.pub')}\n"
        f"then: {folder.command('submit EXPERIMENT')}",
        flush=True,  # a service manager reads it from a pipe
    )
    folder.flower.connect(f"{LOCAL}:{settings.superlink_port}", folder.authority)
    folder.events.write("server_started", port=settings.superlink_port)
    command = [
        program("flower-superlink"),
        *("--ssl-ca-certfile", str(folder.authority)),
        *("--ssl-certfile", str(folder.certificate)),
        *("--ssl-keyfile", str(folder.key)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--host", LOCAL, "--port", str(settings.superlink_port)),
        *("--database", str(folder.database)),
    ]
    if service.supervise(command, folder.flower, folder.log, folder.pid):
        raise UserError(f"Flower's SuperLink has ended by itself; {folder.log} says why")


def backup_server(folder: ServerFolder, to: str) -> list[str]:
    """Copy a server; return the lines to print. UserError: it cannot be."""
    folder.settings()
    done = service.backup({"": folder.path}, at_home(to).absolute())
    return [done, f"to restore: copy it to {folder.path}, and deal server start {folder.path}"]


def registered(folder: ServerFolder) -> dict[str, dict[str, Any]]:
    """Return name to ``key`` (the public line), ``node`` (Flower's id) and ``since``."""
    try:
        sites: dict[str, dict[str, Any]] = json.loads(folder.sites.read_text(encoding="utf-8"))
        return sites
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.sites}: cannot be read ({error}); restore your backup") from None


def add_site(folder: ServerFolder, name: str, key_file: Path) -> list[str]:
    """Let the holder of a key sign in as ``name``; return the lines to print."""
    settings = folder.settings()
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}': a site's name has letters, digits, '.', '_' and '-', up to 64")
    with _changing(folder) as sites:
        key = keys.read_public_key(key_file)
        if name in sites:
            cure = folder.command(f"server remove-site {name}")
            raise UserError(f"'{name}' is registered already; for a new key first {cure}")
        if owner := [other for other, site in sites.items() if site["key"] == key]:
            raise UserError(f"{key_file}: this key is that of '{owner[0]}'; every site has its own")
        answer = folder.flower.ask(
            "supernode", "register", str(key_file.resolve()), CONNECTION, "--name", name
        )
        sites[name] = {"key": key, "node": str(answer["node-id"]), "since": time.time()}
        try:
            _write(folder.sites, sites)
        except OSError as error:  # else Flower would know a key without a name
            folder.flower.ask("supernode", "unregister", sites[name]["node"], CONNECTION)
            raise UserError(f"{folder.sites}: cannot be written ({error.strerror})") from None
    folder.events.write("site_added", site=name, **sites[name])
    return [
        f"registered '{name}' ({len(sites)} in all)",
        f"fingerprint {keys.fingerprint_of_line(key)}: compare it with the site's by telephone",
        f"next: the site runs deal site check and deal site start (server {settings.address}, or "
        f"on this machine, without a proxy, {settings.local_address}); "
        f"when all are there, {folder.command('submit EXPERIMENT')}",
    ]


def remove_site(folder: ServerFolder, name: str) -> list[str]:
    """Refuse the key of ``name`` from now on; return the lines to print."""
    folder.settings()
    with _changing(folder) as sites:
        if name not in sites:
            raise UserError(f"'{name}' is not registered; known: {', '.join(sites) or 'none'}")
        folder.flower.ask("supernode", "unregister", sites[name]["node"], CONNECTION)
        removed = sites.pop(name)
        _write(folder.sites, sites)
    folder.events.write("site_removed", site=name, **removed)
    return [
        f"removed '{name}': its key is refused from now on",
        f"next: for a new key, {folder.command(f'server add-site {name} KEY.pub')} (the name "
        "keeps its place in runs that are continued)",
    ]


@contextmanager
def _changing(folder: ServerFolder) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield the list of sites, which no other command changes within the block."""
    try:
        with FileLock(folder.sites.with_suffix(".lock"), timeout=WAIT_SECONDS):
            yield registered(folder)
    except Timeout:
        raise UserError(
            f"{folder.sites}: another command changes the list; try again when it has ended"
        ) from None


def _write(path: Path, sites: dict[str, dict[str, Any]]) -> None:
    atomic_write(path, json.dumps(sites, indent=1) + "\n")
