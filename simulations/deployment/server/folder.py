"""The server's folder: where everything lies in it, its settings, and ``deal server init``, which
fills it."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from deal_core.config.data import Table
from deal_core.config.file import parse_tables, read_toml
from deal_core.errors import UserError, at_home
from server.folder import EventLog
from simulations.deployment.keys import make_authority, make_server_certificate, write_secret
from simulations.deployment.programs import FlowerHome, filled, service_unit
from simulations.output.files import toml_lines

LOCAL = "127.0.0.1"
HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")


class ServerSettings(Table):
    """``server.toml``."""

    hosts: tuple[str, ...] = Field(min_length=1)
    """Host names and addresses under which sites reach the server; its certificate names them."""
    port: int = Field(9443, ge=1, le=65535)
    """What the reverse proxy listens on, for the sites."""
    superlink_port: int = Field(9444, ge=1, le=65535)
    """What the SuperLink listens on, on this machine alone: who reaches it can start runs."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Prometheus figures on this machine; 0: none."""

    @property
    def address(self) -> str:
        """Where the proxy listens: the address for sites on other machines."""
        return f"{self.hosts[0]}:{self.port}"

    @property
    def local_address(self) -> str:
        """Where the SuperLink listens: the address for sites on this machine, without a proxy."""
        return f"localhost:{self.superlink_port}"


@dataclass(frozen=True)
class ServerFolder:
    """Names inside it."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """``server.toml``."""
        return self.path / "server.toml"

    @property
    def authority(self) -> Path:
        """Certificate of the authority: what every site needs."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """Needed for a new server certificate only; better kept elsewhere."""
        return self.path / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's."""
        return self.path / "server.crt"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.path / "server.key"

    @property
    def database(self) -> Path:
        """What the SuperLink remembers: registered keys and runs."""
        return self.path / "superlink.db"

    @property
    def sites(self) -> Path:
        """Names of the registered sites."""
        return self.path / "sites.json"

    @property
    def runs(self) -> Path:
        """One folder per run."""
        return self.path / "runs"

    @property
    def events(self) -> EventLog:
        """What was done here: who was registered and removed, what was started and stopped."""
        return EventLog(self.path / "events.jsonl")

    @property
    def log(self) -> Path:
        """Flower's own output."""
        return self.path / "superlink.log"

    @property
    def pid(self) -> Path:
        """Process id of ``deal server start``."""
        return self.path / "server.pid"

    @property
    def flower(self) -> FlowerHome:
        """Flower's home."""
        return FlowerHome(self.path / "flower")

    def settings(self) -> ServerSettings:
        """Return ``server.toml``, read and checked.

        Raises:
            UserError: this is no server's folder, or a key of it is wrong.
        """
        if not self.settings_file.is_file():
            raise UserError(
                f"{self.path}: no server.toml; make one with deal server init, or name the "
                "server's folder with --dir"
            )
        where = str(self.settings_file)
        return parse_tables(ServerSettings, read_toml(self.settings_file), where)


def server_folder(path: str) -> ServerFolder:
    """Return the folder at ``path``, absolute."""
    return ServerFolder(at_home(path).resolve())


def command(folder: ServerFolder, words: str) -> str:
    """Return ``deal WORDS`` for the server in ``folder``: with ``--dir``, without which every
    command looks for the server in the folder that it is called from."""
    return f"deal {words} --dir {shlex.quote(str(folder.path))}"


def init_server(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Fill an empty or missing folder.

    Returns:
        The lines to print.

    Raises:
        UserError: the folder holds a server, a host is no name and no address, or it cannot be
            written.
    """
    check_hosts(settings.hosts)
    if settings.port == settings.superlink_port:
        raise UserError("--port and --superlink-port must differ: the proxy stands before the link")
    if folder.settings_file.exists() or folder.authority_key.exists():
        raise UserError(f"{folder.path}: holds a server already; choose another folder")
    proxy = nginx_file(folder, settings)
    try:
        folder.runs.mkdir(parents=True, exist_ok=True)
        folder.path.chmod(0o700)
        _write_keys(folder, settings.hosts)
        folder.flower.connect(f"{LOCAL}:{settings.superlink_port}", folder.authority)
        folder.sites.write_text("{}\n", encoding="utf-8")
        (folder.path / "nginx.conf").write_text(proxy, encoding="utf-8")
        (folder.path / "deal-server.service").write_text(server_unit(folder), encoding="utf-8")
        folder.settings_file.write_text(toml_lines(settings.model_dump()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be written ({error.strerror})") from None
    return next_steps(folder, settings)


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise :class:`UserError` for what is neither a host name nor an address."""
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not HOST.fullmatch(host):
                raise UserError(
                    f"--host {host}: neither a host name nor an address; give it without port"
                ) from None


def _write_keys(folder: ServerFolder, hosts: Sequence[str]) -> None:
    authority = make_authority()
    # The server itself, and its proxy, reach the SuperLink by its local address.
    server = make_server_certificate(authority, list(dict.fromkeys([*hosts, LOCAL, "localhost"])))
    write_secret(folder.authority_key, authority.key)
    write_secret(folder.key, server.key)
    folder.authority.write_bytes(authority.certificate)
    folder.certificate.write_bytes(server.certificate)


def next_steps(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Return what the administrator does now."""
    return [
        f"made {folder.path}: certificates for {', '.join(settings.hosts)}, server.toml, "
        "nginx.conf, deal-server.service",
        "next:",
        f"  1. include {folder.path / 'nginx.conf'} in your reverse proxy (port {settings.port})",
        f"  2. deal server start {folder.path}        (or install deal-server.service)",
        f"  3. send {folder.authority} and the address {settings.address} to every site",
        f"  4. for each key that comes back: {command(folder, 'server add-site NAME KEY.pub')}",
        f"  without a proxy, for sites on this machine alone: leave out 1; their address is "
        f"{settings.local_address}",
        f"  keep {folder.authority_key.name} offline: it is needed for a new certificate only",
    ]


def nginx_file(folder: ServerFolder, settings: ServerSettings) -> str:
    """Return a server block for nginx."""
    return filled(
        "nginx.conf",
        port=settings.port,
        names=" ".join(settings.hosts),
        certificate=_nginx(folder.certificate),
        key=_nginx(folder.key),
        authority=_nginx(folder.authority),
        superlink_port=settings.superlink_port,
    )


def _nginx(path: Path) -> str:
    """Return one word of nginx's, whatever a path contains but ``$``, which nginx cannot quote.

    Raises:
        UserError: the path has one.
    """
    if "$" in str(path):
        raise UserError(f"{path}: nginx cannot be told of a path with $; choose another folder")
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def server_unit(folder: ServerFolder) -> str:
    """Return a systemd unit that keeps the server running; it cannot change its settings and
    keys."""
    fixed = (folder.settings_file, folder.authority, folder.certificate, folder.key)
    what = "Federated DEAL: server"
    return service_unit(what, "deal-server", "server start", folder.path, fixed, folder.path)
