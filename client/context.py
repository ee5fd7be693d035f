"""Where a request has arrived: at which client, with which folder, log and experiment."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context

from client.gate import require_same_package
from client.site_file import NAME, NODE_KEY, SiteFile, as_the_site_decides, read_site
from client.site_log import SiteLog
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import from_run_config, run_name
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy


@dataclass(frozen=True)
class RequestContext:
    """One client.

    Attributes:
        client: its number.
        folder: what it keeps of this run, between requests and restarts.
        site: what an institution has decided; None where the client is simulated.
    """

    client: int
    folder: Path
    site: SiteFile | None = None

    def experiment(self, run_config: Mapping[str, Any]) -> Experiment:
        """Return the experiment as it holds here.

        Raises:
            UserError: it asks for what the site does not allow.
        """
        asked = from_run_config(run_config)
        return asked if self.site is None else as_the_site_decides(asked, self.site)

    @property
    def policy(self) -> Policy | None:
        """The site's; None where it has none, or the client is simulated. Where peers are pinned
        the server vouches for none."""
        if self.site is None or self.site.policy is None:
            return None
        if not self.site.peers:
            return self.site.policy
        return self.site.policy.model_copy(update={"server_vouches_for_peers": False})

    def asked_model(self, experiment: Experiment) -> str:
        """Return the name of the base model as the server knows it; of several that lie in the same
        place here, the first."""
        name = experiment.model.name
        known = self.site.models if self.site is not None else {}
        return next((asked for asked, place in known.items() if (place or asked) == name), name)

    def as_of_today(self, request: str) -> str:
        """Return the name of a request under the policy of today: what was kept, or masked, under
        another one is no answer to it."""
        said = "" if self.policy is None else self.policy.model_dump_json()
        return f"{request} {hashlib.sha256(said.encode()).hexdigest()}"

    def run_name(self, run_config: Mapping[str, Any]) -> str:
        """Return whose run a request is of: its settings as they are asked for, which stay when the
        site changes its own file, and, at a site, the run's own name.

        Raises:
            UserError: they are none.
        """
        settings = run_name(from_run_config(run_config))
        return settings if self.site is None else f"{settings} {self.folder.name}"


def here(context: Context) -> RequestContext:
    """Return which client this is.

    Raises:
        UserError: ``site.toml`` cannot be used, or the run does not know this site.
        Refusal: another federated-deal is installed here than at the server.
    """
    asked = from_run_config(context.run_config)
    out = asked.run.out
    if NODE_KEY in context.node_config:
        site = read_site(Path(str(context.node_config[NODE_KEY])))
        require_same_package(context.run_config)
        return _at_site(site, asked)
    client = int(context.node_config["partition-id"])
    return RequestContext(client, Path(out or f"deal-run-{context.run_id}") / "sites" / str(client))


def _at_site(site: SiteFile, asked: Experiment) -> RequestContext:
    name, sites = site.site.name, asked.federation.sites
    if name not in sites:
        raise UserError(f"the run is for {', '.join(sites)}, and this site is '{name}'")
    run = Path(asked.run.out).name
    if not NAME.fullmatch(run):  # a name from outside, about to become a folder
        raise UserError(f"the name of the run, {run[:80]!r}, is none")
    return RequestContext(sites.index(name), Path(site.site.state) / "runs" / run, site)


def file_of(context: Context) -> SiteFile | None:
    """What ``site.toml`` says; None for a simulated client, and where it cannot be read."""
    try:
        return read_site(Path(str(context.node_config[NODE_KEY])))
    except KeyError:
        return None
    except UserError:
        logging.getLogger(__name__).exception("no site.toml")
        return None


def log_of(context: Context) -> SiteLog | None:
    """The site's log, where there is a site."""
    site = file_of(context)
    return None if site is None else SiteLog(Path(site.site.state))


def choose_device(site: SiteFile) -> None:
    """Show torch only the device that the site lends; before torch is imported."""
    kind, _, number = site.compute.device.partition(":")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number
