"""Client identity, state and policy of a request."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context

from client.gate import as_the_site_decides, require_same_package
from client.site_file import NAME, NODE_KEY, SiteFile, SiteLog, read_site
from client.state import GivenSums, folder_of
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import from_run_config, run_name
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy

if TYPE_CHECKING:
    from deal_core.privacy.interface import Site


def site_of(client: Client) -> Site:
    """Return what a privacy mechanism must know of a client. An institution's ledger outlives all
    runs, and lies in its state folder; a simulated client's lies in its folder of the run."""
    from deal_core.privacy.interface import Site
    from deal_core.privacy.ledger import Ledger

    if client.file is None:
        return Site(partial(Ledger, client.folder), None, simulated=True)
    state = Path(client.file.site.state)
    return Site(partial(Ledger, state), client.policy, simulated=False)


SiteOf = Callable[["Client"], "Site"]
"""What a privacy mechanism must know of a client."""


@dataclass(frozen=True)
class Client:
    """One client of a run.

    Attributes:
        number: of the client in the run.
        folder: what it keeps of this run, between requests and restarts.
        asked: the experiment, as the server asks for it.
        file: what an institution has decided; None where the client is simulated.
        find_site: what a privacy mechanism must know of it; another one in tests of policies.
    """

    number: int
    folder: Path
    asked: Experiment
    file: SiteFile | None = None
    find_site: SiteOf = site_of

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment as it holds here.

        Raises:
            OutsidePolicy: it asks for what the site does not allow.
        """
        return self.asked if self.file is None else as_the_site_decides(self.asked, self.file)

    @property
    def policy(self) -> Policy | None:
        """The site's; None where it has none, or the client is simulated. Where peers are pinned
        the server vouches for none."""
        if self.file is None or self.file.policy is None:
            return None
        if not self.file.peers:
            return self.file.policy
        return self.file.policy.model_copy(update={"server_vouches_for_peers": False})

    @cached_property
    def site(self) -> Site:
        """What a privacy mechanism must know of the client."""
        found = self.find_site(self)
        return found if self.file is None else replace(found, run=self.run)

    @cached_property
    def run(self) -> str:
        """Whose run a request is of: its settings as they are asked for, which stay when the site
        changes its own file, and, at a site, the run's own name."""
        settings = run_name(self.asked)
        return settings if self.file is None else f"{settings} {self.folder.name}"

    @property
    def kept(self) -> Path:
        """Folder of what methods keep in this run, of these very settings."""
        return folder_of(self.folder, "" if self.file is None else self.run)

    @property
    def given(self) -> GivenSums | None:
        """The class sums that the site has given; None: the client is simulated."""
        return None if self.file is None else GivenSums(Path(self.file.site.state) / "sums")

    @property
    def log(self) -> SiteLog | None:
        """The site's log, where there is a site."""
        return log_of(self.file)

    def asked_model(self, experiment: Experiment) -> str:
        """Return the name of the base model as the server knows it; of several that lie in the same
        place here, the first."""
        name = experiment.model.name
        known = self.file.models if self.file is not None else {}
        return next((asked for asked, place in known.items() if (place or asked) == name), name)

    def as_of_today(self, request: str) -> str:
        """Return the name of a request under the policy of today: what was kept, or masked, under
        another one is no answer to it."""
        said = "" if self.policy is None else self.policy.model_dump_json()
        return f"{request} {hashlib.sha256(said.encode()).hexdigest()}"


def client_of(
    context: Context, file: SiteFile | None = None, find_site: SiteOf = site_of
) -> Client:
    """Return which client this is.

    Args:
        context: of the request.
        file: what :func:`file_of` returns of it.
        find_site: see :class:`Client`.

    Raises:
        UserError: ``site.toml`` cannot be used, or the run does not know this site.
        Refusal: another federated-deal is installed here than at the server.
    """
    asked = from_run_config(context.run_config)
    out = asked.run.out
    if NODE_KEY not in context.node_config:
        number = int(context.node_config["partition-id"])
        folder = Path(out or f"deal-run-{context.run_id}") / "sites" / str(number)
        return Client(number, folder, asked, None, find_site)
    file = file or read_site(Path(str(context.node_config[NODE_KEY])))
    require_same_package(context.run_config)
    name, sites, run = file.site.name, asked.federation.sites, Path(out).name
    if name not in sites:
        raise UserError(f"the run is for {', '.join(sites)}, and this site is '{name}'")
    if not NAME.fullmatch(run):  # a name from outside, about to become a folder
        raise UserError(f"the name of the run, {run[:80]!r}, is none")
    folder = Path(file.site.state) / "runs" / run
    return Client(sites.index(name), folder, asked, file, find_site)


def file_of(context: Context) -> SiteFile | None:
    """What ``site.toml`` says; None for a simulated client, and where it cannot be read."""
    try:
        return read_site(Path(str(context.node_config[NODE_KEY])))
    except KeyError:
        return None
    except UserError:
        logging.getLogger(__name__).exception("no site.toml")
        return None


def log_of(file: SiteFile | None) -> SiteLog | None:
    """The site's log, where there is a site."""
    return None if file is None else SiteLog(Path(file.site.state))
