"""Who takes part in a run, and who of them is connected now.

Clients go by name, a number as text, in everything that is seeded or stored: names are stable
across runs and restarts, node ids need not be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from deal_core.config.experiment import FederationConfig
from deal_core.errors import UserError
from server.reply_collection import POLL_SECONDS, find_clients


@dataclass(frozen=True)
class Roster:
    """The clients of a run.

    Attributes:
        clients: names of all, in their order.
        connected: asks who is connected now; client name to node id.
        patience: seconds that a round waits for clients that are not.
        keys: asks for the public keys with which sites have signed in; client name to PEM. A
            simulated client has none.
    """

    clients: tuple[str, ...]
    connected: Callable[[], Mapping[str, int]]
    patience: float = 0.0
    keys: Callable[[], Mapping[str, bytes]] = dict

    def present(self, wanted: set[str], least: float) -> dict[str, int]:
        """Return who of ``wanted`` is connected; waits, within its patience, for ``least`` of
        them. Fewer may come back."""
        end = time.monotonic() + self.patience
        while True:
            found = {name: node for name, node in self.connected().items() if name in wanted}
            if len(found) >= min(least, len(wanted)) or time.monotonic() >= end:
                return found
            time.sleep(POLL_SECONDS)


def find_roster(grid: Grid, config: FederationConfig) -> Roster:
    """Wait for the clients, at most ``connect_seconds``.

    Simulated clients all have to come, and are asked who they are. Registered sites are known by
    the key with which they have signed in; a run starts with a quorum of them, and the others
    may come later.

    Returns:
        All clients of the run, and how to learn who of them is connected.

    Raises:
        UserError: too few clients, or two with one name.
    """
    if not config.sites:
        nodes = find_clients(grid, config.clients, config.connect_seconds)
        return Roster(tuple(nodes), lambda: nodes)
    sites = config.sites
    names = tuple(map(str, range(len(sites))))
    roster = Roster(
        names,
        lambda: {name: node.node_id for name, node in signed_in(grid, sites).items()},
        config.connect_seconds,
        lambda: {name: node.public_key for name, node in signed_in(grid, sites).items()},
    )
    there = roster.present(set(names), len(names))
    if len(there) < config.quorum * len(names):
        missing = ", ".join(sites[int(name)] for name in names if name not in there)
        raise UserError(
            f"only {len(there)} of {len(names)} sites are connected after "
            f"{config.connect_seconds:g} s (missing: {missing}); start them with deal site start, "
            "or lower federation.quorum"
        )
    return roster


def signed_in(grid: Grid, sites: tuple[str, ...]) -> dict[str, NodeInfo]:
    """Return client name to what Flower knows of it, of the sites that are connected now.

    Raises:
        UserError: two nodes are registered under one name.
    """
    found: dict[str, NodeInfo] = {}
    for node in sorted(grid.get_nodes(), key=lambda node: node.node_id):
        if node.name not in sites:
            continue
        name = str(sites.index(node.name))
        if name in found:
            raise UserError(
                f"two sites are registered as '{node.name}'; unregister one with "
                "deal server remove-site and add it under another name"
            )
        found[name] = node
    return found
