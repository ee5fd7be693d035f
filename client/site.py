"""What a client is to a privacy mechanism: its ledger, its policy, and whether it is real."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.context import RequestContext
    from deal_core.privacy.interface import Site


def site_of(place: RequestContext) -> Site:
    """Return the site behind a request. An institution's ledger outlives all runs, and lies in its
    state folder; a simulated client's lies in its folder of the run."""
    from deal_core.privacy.interface import Site
    from deal_core.privacy.ledger import Ledger

    if place.site is None:
        return Site(partial(Ledger, place.folder), None, simulated=True)
    state = Path(place.site.site.state)
    return Site(partial(Ledger, state), place.policy, simulated=False)
