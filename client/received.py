"""A request that has arrived, and what a client answers it from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message

from client.context import RequestContext
from client.state import FeedbackStore, folder_of

if TYPE_CHECKING:
    from client.client_context import ClientContext
    from client.resources import Workbench
    from deal_core.privacy.interface import Site

SiteOf = Callable[[RequestContext], "Site"]
"""What a privacy mechanism must know of a client."""


@dataclass(frozen=True)
class Received:
    """Attributes: the ``message``; Flower's ``context`` of it; the ``client`` it has come to; the
    ``bench`` of its experiment; ``find_site``, what a privacy mechanism must know of a client."""

    message: Message
    context: Context
    client: RequestContext
    bench: Workbench
    find_site: SiteOf

    @property
    def run(self) -> str:
        """Whose run it is of: see :meth:`~client.context.RequestContext.run_name`."""
        return self.client.run_name(dict(self.context.run_config))

    def client_context(self) -> ClientContext:
        """Return whose data it is about, what is kept of them, and by what rules."""
        from client.client_context import ClientContext
        from client.given_sums import GivenSums

        found = self.find_site(self.client)
        site = found if self.client.site is None else replace(found, run=self.run)
        store = FeedbackStore(folder_of(self.client.folder, site.run))
        given = None
        if self.client.site is not None:
            given = GivenSums(Path(self.client.site.site.state) / "sums")
        return ClientContext(self.client.client, store, site, given)
