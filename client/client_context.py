"""Whose work a request is."""

from __future__ import annotations

from dataclasses import dataclass

from client.given_sums import GivenSums
from client.state import FeedbackStore
from deal_core.privacy.interface import Site


@dataclass(frozen=True)
class ClientContext:
    """Whose work it is: the number of the ``client``, the ``store`` of what its code lost, what
    the privacy mechanism must know of its ``site``, and the class sums that this has ``given``
    (None: it is simulated)."""

    client: int
    store: FeedbackStore
    site: Site
    given: GivenSums | None = None
