"""The server's folder: its settings, and where everything lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from deal_core.config.file import parse_tables, read_toml
from deal_core.config.home import at_home
from deal_core.config.table import Table
from deal_core.errors import UserError
from server.events import EventLog
from simulations.deployment.flower_home import FlowerHome


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
