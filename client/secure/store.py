"""What a client keeps of the secure sums of a run: on the disk for good before a reply leaves.

Its files are for their owner alone, and for no backup: from an older copy two vectors could be
masked with one mask. Source: docs/secure-aggregation.md, 'State'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.alone import OWNER_ALONE, alone
from deal_core.atomic_write import atomic_write
from deal_core.secure_sum.messages import ProtocolError
from deal_core.secure_sum.site_state import SiteState, UsedUpdates

STATE, USED, LOCK = "secure-sum.state", "secure-sum.used", "secure-sum.lock"
ANNOUNCED, UPDATES = "announced", "update-*"
"""What a backup does have: that the site has announced itself in the run, and its updates."""


@dataclass(frozen=True)
class SecureStore:
    """Attributes: ``folder``, the client's own, of one run; made when first needed."""

    folder: Path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process answers for this client."""
        with alone(self.folder, LOCK):
            yield

    def state(self) -> SiteState | None:
        """Return the state that is kept; None: there is none.

        Raises:
            ProtocolError: it is damaged; a new one is not made in its place.
        """
        path = self.folder / STATE
        return SiteState.from_bytes(path.read_bytes()) if path.exists() else None

    def keep(self, state: SiteState) -> None:
        """Write the state."""
        atomic_write(self.folder / STATE, state.to_bytes(), OWNER_ALONE, for_good=True)

    def open(self, state: SiteState) -> None:
        """Write the first state of a run, no update being in a sum.

        Raises:
            ProtocolError: the site has announced itself before and has lost what it kept; with a
                new state an update that is in a sum could enter a second one.
        """
        if self._lost():
            raise ProtocolError("what this site kept of the run is lost; it sits the run out")
        if not (self.folder / USED).exists():
            self.keep_used(UsedUpdates())
        self.keep(state)

    def note_announced(self) -> None:
        """Write, once, that there is a state."""
        if not (self.folder / ANNOUNCED).exists():
            atomic_write(self.folder / ANNOUNCED, b"", OWNER_ALONE, for_good=True)

    def _lost(self) -> bool:
        """Whether there was a state that is no longer here."""
        known = (self.folder / ANNOUNCED).exists() or any(self.folder.glob(UPDATES))
        return known and not (self.folder / STATE).exists()

    def used(self) -> UsedUpdates:
        """Return which updates are in a sum.

        Raises:
            ProtocolError: the record of them is lost.
        """
        path = self.folder / USED
        if not path.exists():
            raise ProtocolError("the record of summed updates is lost; this site sits the run out")
        return UsedUpdates.from_bytes(path.read_bytes())

    def keep_used(self, used: UsedUpdates) -> None:
        """Write which updates are in a sum."""
        atomic_write(self.folder / USED, used.to_bytes(), OWNER_ALONE, for_good=True)
