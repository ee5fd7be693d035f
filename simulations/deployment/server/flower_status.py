"""What Flower itself says of a run."""

from __future__ import annotations

from deal_core.errors import UserError
from simulations.deployment.flower_home import CONNECTION
from simulations.deployment.server.folder import ServerFolder


def flower_status(folder: ServerFolder, number: str) -> str:
    """Return what Flower says of a start of a run; empty where it cannot be asked.

    Args:
        folder: of the server.
        number: Flower's id of the start.
    """
    try:
        runs = folder.flower.ask("list", CONNECTION, "--run-id", number)["runs"]
    except UserError:
        return ""
    return str(runs[0]["status"]) if runs else "unknown"
