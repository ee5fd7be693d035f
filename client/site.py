"""What a client is to a privacy mechanism: its ledger, its policy, and whether it is real."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context

if TYPE_CHECKING:
    from deal_core.privacy.interface import Site
    from deal_core.privacy.policy import Policy

STATE = "state-dir"
"""Key of the node's configuration that only a real site has: where its state lives."""


def site_folder(context: Context) -> Path:
    """Where the client keeps what must outlive a request: its own folder, or, in a simulation,
    one inside the run folder."""
    if STATE in context.node_config:
        return Path(str(context.node_config[STATE]))
    out = str(context.run_config.get("run.out", "")) or f"deal-run-{context.run_id}"
    return Path(out) / "sites" / str(context.node_config["partition-id"])


def site_of(context: Context, policy: Policy | None) -> Site:
    """The site behind a request.

    Args:
        policy: None: the site has none, and does what the experiment asks.
    """
    from deal_core.ledger import Ledger
    from deal_core.privacy.interface import Site

    folder = site_folder(context)
    return Site(partial(Ledger, folder), policy, simulated=STATE not in context.node_config)
