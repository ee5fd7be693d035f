"""``deal server init``: everything a server needs, in one folder."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from deal_core.errors import UserError
from simulations.deployment.secret_files import write_secret
from simulations.deployment.server.certificates import make_authority, make_server_certificate
from simulations.deployment.server.folder import ServerFolder, ServerSettings
from simulations.deployment.server.next_command import command
from simulations.deployment.server.nginx import nginx_file
from simulations.deployment.service_units import service_unit
from simulations.output.toml import toml_lines

LOCAL = "127.0.0.1"
HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")


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


def server_unit(folder: ServerFolder) -> str:
    """Return a systemd unit that keeps the server running; it cannot change its settings and
    keys."""
    fixed = (folder.settings_file, folder.authority, folder.certificate, folder.key)
    what = "Federated DEAL: server"
    return service_unit(what, "deal-server", "server start", folder.path, fixed, folder.path)
