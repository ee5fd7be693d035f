"""``deal server start``, ``add-site``, ``remove-site``, ``sites``: Flower's SuperLink with TLS and
a lasting memory, and who may sign in at it: the names of sites, and the keys that go with them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from client.site_file import NAME
from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError
from simulations.deployment.keys import check_secret, fingerprint_of_line, read_public_key
from simulations.deployment.programs import CONNECTION, check_free, supervise
from simulations.deployment.server.folder import LOCAL, ServerFolder, ServerSettings, command
from simulations.engines.flower import program

WAIT_SECONDS = 60.0
"""For a command that changes the list at the same time."""


def start_server(folder: ServerFolder) -> None:
    """Run the SuperLink until it is asked to end.

    Raises:
        UserError: no server's folder, an unsafe key, a port in use, it runs already, or it has
            ended by itself.
    """
    settings = folder.settings()
    check_secret(folder.key)
    check_free(
        settings.superlink_port,
        "superlink_port in server.toml, and the port that nginx.conf passes requests to",
    )
    folder.flower.connect(f"{LOCAL}:{settings.superlink_port}", folder.authority)
    if settings.metrics_port:
        check_free(settings.metrics_port, "metrics_port in server.toml")
        from simulations.deployment.server.run_state import serve

        serve(folder, settings.metrics_port)
    folder.events.write("server_started", port=settings.superlink_port)
    command = superlink_command(folder, settings)
    if supervise(command, folder.flower, folder.log, folder.pid):
        raise UserError(f"Flower's SuperLink has ended by itself; {folder.log} says why")


def starting_lines(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Return what is about to run, and what to do next."""
    lines = [
        f"SuperLink on {LOCAL}:{settings.superlink_port}, log in {folder.log}; Ctrl-C ends it",
        f"sites on this machine reach it at {settings.local_address}, without a proxy; others at "
        f"{settings.address}, where the proxy listens (nginx.conf)",
        f"next, in another terminal, for each site: "
        f"{command(folder, 'server add-site NAME KEY.pub')}",
        f"then: {command(folder, 'submit EXPERIMENT')}",
    ]
    if settings.metrics_port:
        lines.append(f"Prometheus figures on http://{LOCAL}:{settings.metrics_port}/metrics")
    return lines


def superlink_command(folder: ServerFolder, settings: ServerSettings) -> list[str]:
    """Flower's own program, bound to this machine: sites come through the proxy."""
    return [
        program("flower-superlink"),
        *("--ssl-ca-certfile", str(folder.authority)),
        *("--ssl-certfile", str(folder.certificate)),
        *("--ssl-keyfile", str(folder.key)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--host", LOCAL, "--port", str(settings.superlink_port)),
        *("--database", str(folder.database)),
    ]


def registered(folder: ServerFolder) -> dict[str, dict[str, Any]]:
    """Return name to ``key`` (the public line), ``node`` (Flower's id) and ``since``, in the order
    in which they were added.

    Raises:
        UserError: the list cannot be read.
    """
    try:
        sites: dict[str, dict[str, Any]] = json.loads(folder.sites.read_text(encoding="utf-8"))
        return sites
    except (OSError, ValueError) as error:
        raise UserError(f"{folder.sites}: cannot be read ({error}); restore your backup") from None


def add_site(folder: ServerFolder, name: str, key_file: Path) -> list[str]:
    """Let the holder of a key sign in as ``name``.

    Returns:
        The lines to print.

    Raises:
        UserError: a name or key that is taken or none, or the server is not running.
    """
    settings = folder.settings()
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}': a site's name has letters, digits, '.', '_' and '-', up to 64")
    with _alone(folder):
        return _add(folder, settings, name, key_file)


def _add(folder: ServerFolder, settings: ServerSettings, name: str, key_file: Path) -> list[str]:
    key, sites = read_public_key(key_file), registered(folder)
    if name in sites:
        cure = command(folder, f"server remove-site {name}")
        raise UserError(f"'{name}' is registered already; for a new key first {cure}")
    for other, site in sites.items():
        if site["key"] == key:
            raise UserError(f"{key_file}: this key is that of '{other}'; every site has its own")
    answer = folder.flower.ask(
        "supernode", "register", str(key_file.resolve()), CONNECTION, "--name", name
    )
    sites[name] = {"key": key, "node": str(answer["node-id"]), "since": time.time()}
    try:
        _write(folder.sites, sites)
    except OSError as error:  # else Flower would know the key, and nobody its name
        folder.flower.ask("supernode", "unregister", sites[name]["node"], CONNECTION)
        raise UserError(f"{folder.sites}: cannot be written ({error.strerror})") from None
    folder.events.write("site_added", site=name, **sites[name])
    return [
        f"registered '{name}' ({len(sites)} in all)",
        f"fingerprint {fingerprint_of_line(key)}: compare it with the site's by telephone",
        f"next: the site runs deal site check and deal site start (server {settings.address}, or "
        f"on this machine, without a proxy, {settings.local_address}); "
        f"when all are there, {command(folder, 'submit EXPERIMENT')}",
    ]


def listed(folder: ServerFolder) -> list[str]:
    """Return a line for each registered site: its name, the fingerprint of its key, and since when.

    Raises:
        UserError: this is no server's folder, or the list cannot be read.
    """
    folder.settings()
    sites = registered(folder)
    if not sites:
        return [f"no site is registered; next: {command(folder, 'server add-site NAME KEY.pub')}"]
    width = max(map(len, sites))
    return [
        f"{name:<{width}}  {fingerprint_of_line(site['key'])}  since {_day(site['since'])}"
        for name, site in sites.items()
    ] + ["compare each with what deal site check prints there, by telephone"]


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).date().isoformat()


def remove_site(folder: ServerFolder, name: str) -> list[str]:
    """Let nobody sign in as ``name`` any more.

    Returns:
        The lines to print.

    Raises:
        UserError: no such site, or the server is not running.
    """
    folder.settings()
    with _alone(folder):
        return _remove(folder, name)


def _remove(folder: ServerFolder, name: str) -> list[str]:
    sites = registered(folder)
    if name not in sites:
        raise UserError(f"'{name}' is not registered; known: {', '.join(sites) or 'none'}")
    folder.flower.ask("supernode", "unregister", sites[name]["node"], CONNECTION)
    removed = sites.pop(name)
    _write(folder.sites, sites)
    folder.events.write("site_removed", site=name, **removed)
    return [
        f"removed '{name}': its key is refused from now on",
        f"next: for a new key, {command(folder, f'server add-site {name} KEY.pub')} (the name "
        "keeps its place in runs that are continued)",
    ]


@contextmanager
def _alone(folder: ServerFolder) -> Iterator[None]:
    """Within the block no other command changes the list, which is read, and written whole."""
    try:
        with FileLock(folder.sites.with_suffix(".lock"), timeout=WAIT_SECONDS):
            yield
    except Timeout:
        raise UserError(
            f"{folder.sites}: another command changes the list; try again when it has ended"
        ) from None


def _write(path: Path, sites: dict[str, dict[str, Any]]) -> None:
    atomic_write(path, json.dumps(sites, indent=1) + "\n")
