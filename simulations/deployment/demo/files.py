"""A demonstration's folder, and everything that server and sites need before they start: keys, the
embedded questions as files of sites, and the experiment on which all of them agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import TaskData, open_source, partition
from deal_core.data.source import Example
from deal_core.errors import UserError, at_home
from simulations.deployment.programs import filled
from simulations.deployment.server.folder import LOCAL, ServerFolder, ServerSettings, init_server
from simulations.deployment.site.init import SiteRequest, agreed_labels, init_site
from simulations.output.files import toml_value
from simulations.run.experiment import Request, load_experiment

NAMES = ("north", "south", "west")
"""Of the sites; a demonstration has the first two or all."""
DEFAULT = Path("runs") / "demo-deployment"
TASKS = ("laboratory", "surgery")
TRAIN_ROWS = 240
"""Of a task, all sites together."""
TEST_ROWS = 120
SEED = 0
POLICY = """\
# The embedded questions are public, so this demonstration is without privacy. What deal site init
# writes by itself asks for differential privacy, and lets no count of right answers leave.
metrics = "clear"
share_num_examples = true
share_sums = true
"""
Shown = Callable[..., None]
"""Takes the words of a ``deal`` command that does the same."""


@dataclass(frozen=True)
class DemoFolder:
    """Names inside it."""

    path: Path

    @property
    def server(self) -> ServerFolder:
        """As of ``deal server init``."""
        return ServerFolder(self.path / "server")

    @property
    def experiment(self) -> Path:
        """Tasks, labels and rounds, which server and sites know."""
        return self.path / "two-tasks.toml"

    @property
    def sites(self) -> Path:
        """Of all sites."""
        return self.path / "sites"

    def site(self, name: str) -> Path:
        """As of ``deal site init``."""
        return self.sites / name

    def data(self, name: str) -> Path:
        """What a site has: one folder per task."""
        return self.path / "data" / name

    def output(self, name: str) -> Path:
        """What ``deal server start`` or ``deal site start`` prints."""
        return self.path / f"{name}.out"


def new_folder(asked: str) -> DemoFolder:
    """Return a folder that is not there yet; without a wish the first free one below ``runs``.

    Raises:
        UserError: the wanted one is there already.
    """
    if asked:
        path = at_home(asked).resolve()
        if path.exists():
            raise UserError(f"--dir {asked}: is there already; choose a new folder")
        return DemoFolder(path)
    numbered = (DEFAULT.with_name(f"{DEFAULT.name}-{number}") for number in count(2))
    free = DEFAULT if not DEFAULT.exists() else next(each for each in numbered if not each.exists())
    return DemoFolder(free.resolve())


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


def write_shares(folder: DemoFolder, names: Sequence[str]) -> None:
    """Divide the training and test questions of both tasks among the sites, as CSV, and write the
    experiment; every question is at one site.

    Args:
        folder: of the demonstration.
        names: of the sites.

    Raises:
        UserError: the embedded data are not installed, or the folder cannot be written.
    """
    source = open_source(DataConfig(tasks=TASKS, max_train=TRAIN_ROWS, max_test=TEST_ROWS))
    tasks = [source.load(name) for name in TASKS]
    try:
        for task in tasks:
            for name, share in zip(names, divided(task, len(names)), strict=True):
                for split, examples in (("train", share.train), ("test", share.test)):
                    _write(folder, name, f"{task.name}/{split}.csv", examples)
        folder.experiment.write_text(_experiment(tasks, len(names)), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder.path}: cannot be written ({error.strerror}); name another folder"
        ) from None


def divided(task: TaskData, sites: int) -> list[TaskData]:
    """Return each site's part: labels in other shares than elsewhere, as between hospitals."""
    return partition(task, PartitionConfig(kind="dirichlet", alpha=1.0), sites, SEED)


def _write(folder: DemoFolder, name: str, place: str, examples: Sequence[Example]) -> None:
    import pandas as pd

    path = folder.data(name) / place
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": each.text, "label": each.label} for each in examples]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)


def _experiment(tasks: Sequence[TaskData], sites: int) -> str:
    labels = "\n".join(f"{toml_value(task.name)} = {toml_value(task.labels)}" for task in tasks)
    threads = max(1, (os.cpu_count() or 1) // sites)
    return filled("two-tasks.toml", tasks=toml_value(list(TASKS)), labels=labels, threads=threads)
