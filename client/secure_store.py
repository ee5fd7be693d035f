"""What a client keeps of the secure sums of a run: on the disk for good before a reply leaves.

Its files are for their owner alone, and for no backup: from an older copy two vectors could be
masked with one mask. Source: docs/secure-aggregation.md, 'State'.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deal_core.secure_sum.site_state import SiteState
from deal_core.secure_sum.used_updates import UsedUpdates
from deal_core.whole_file import write_whole

STATE, USED, LOCK = "secure-sum.state", "secure-sum.used", "secure-sum.lock"
OWNER_ALONE = 0o600


@dataclass(frozen=True)
class SecureStore:
    """Attributes: ``folder``, the client's own, of one run; made when first needed."""

    folder: Path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process answers for this client."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self.folder / LOCK, os.O_CREAT | os.O_WRONLY, OWNER_ALONE)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
        write_whole(self.folder / STATE, state.to_bytes(), OWNER_ALONE, for_good=True)

    def used(self) -> UsedUpdates:
        """Return which updates are in a sum."""
        path = self.folder / USED
        return UsedUpdates.from_bytes(path.read_bytes()) if path.exists() else UsedUpdates()

    def keep_used(self, used: UsedUpdates) -> None:
        """Write which updates are in a sum."""
        write_whole(self.folder / USED, used.to_bytes(), OWNER_ALONE, for_good=True)
