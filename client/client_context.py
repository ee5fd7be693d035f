"""Whose work a request is."""

from __future__ import annotations

from dataclasses import dataclass

from client.state import FeedbackStore
from deal_core.privacy.interface import Site


@dataclass(frozen=True)
class ClientContext:
    """Whose work it is: the number of the ``client``, the ``store`` of what its code lost, and
    what the privacy mechanism must know of its ``site``."""

    client: int
    store: FeedbackStore
    site: Site
