"""The folder of a demonstration: a server, its sites, their data, and what both have agreed on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

from deal_core.config.home import at_home
from deal_core.errors import UserError
from simulations.deployment.server.folder import ServerFolder

NAMES = ("north", "south", "west")
"""Of the sites; a demonstration has the first two or all."""
DEFAULT = Path("runs") / "demo-deployment"


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
