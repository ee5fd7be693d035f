"""Everything that server and sites need before they start: keys, data, an agreed experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from deal_core.config.home import at_home
from deal_core.errors import UserError
from simulations.deployment.demo.folder import NAMES, DemoFolder
from simulations.deployment.demo.shares import write_shares
from simulations.deployment.server.folder import ServerSettings
from simulations.deployment.server.init import LOCAL, init_server
from simulations.deployment.site.init import SiteRequest, init_site
from simulations.deployment.site.labels import agreed_labels
from simulations.run.experiment import Request, load_experiment

POLICY = """\
# The embedded questions are public, so this demonstration is without privacy. What deal site init
# writes by itself asks for differential privacy, and lets no count of right answers leave.
metrics = "clear"
share_num_examples = true
share_sums = true
"""
Shown = Callable[..., None]
"""Takes the words of a ``deal`` command that does the same."""


def write_files(path: Path, sites: int, port: int) -> list[str]:
    """Fill a folder.

    Args:
        path: of the demonstration.
        sites: two or three.
        port: of the SuperLink.

    Returns:
        The commands that start all of it.

    Raises:
        UserError: there is a server or a site already, or it cannot be written.
    """
    folder, names = DemoFolder(at_home(path).resolve()), NAMES[:sites]
    if folder.server.path.exists() or folder.sites.exists():
        raise UserError(f"{path}: holds a demonstration already; name a new folder")
    write_shares(folder, names)
    write_server(folder, port, port - 1)
    write_sites(folder, names, port)
    server = folder.server.path
    lines = [f"made {folder.path}; next:", f"  deal server start {server}"]
    for name in names:
        site = folder.site(name)
        lines += [
            f"  deal server add-site {name} {site / 'site.pub'} --dir {server}",
            f"  deal site start {site}",
        ]
    return [*lines, f"  deal submit {folder.experiment} --dir {server}"]


def write_server(
    folder: DemoFolder, port: int, proxy: int, shown: Shown = lambda *words: None
) -> None:
    """Make certificates and settings of a server without a proxy: it is reached on this machine
    alone, by whoever may use the machine.

    Args:
        folder: of the demonstration.
        port: of the SuperLink.
        proxy: another one, on which nobody listens.
        shown: hears the command.
    """
    shown("server init", folder.server.path, "--host", LOCAL, "--superlink-port", port)
    settings = ServerSettings(hosts=(LOCAL,), port=proxy, superlink_port=port)
    init_server(folder.server, settings)


def write_sites(
    folder: DemoFolder, names: Sequence[str], port: int, shown: Shown = lambda *words: None
) -> None:
    """Make keys and ``site.toml`` of every site, for the tasks of the experiment.

    Args:
        folder: of the demonstration; server, data and experiment are there.
        names: of the sites.
        port: of the SuperLink.
        shown: hears the commands.
    """
    labels = agreed_labels(load_experiment(Request(str(folder.experiment))))
    address = f"{LOCAL}:{port}"
    for name in names:
        site, data, authority = folder.site(name), folder.data(name), folder.server.authority
        shown(
            *("site init", site, "--name", name, "--data", data, "--server", address),
            *("--certificate", authority, "--experiment", folder.experiment),
        )
        init_site(SiteRequest(site, data, name, address, authority, labels=labels, policy=POLICY))
