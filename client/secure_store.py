"""What a client keeps of the secure sums of a run: durable before a reply leaves."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deal_core.secure_sum.site_state import SiteState
from deal_core.secure_sum.used_updates import UsedUpdates
from deal_core.whole_file import write_whole


@dataclass(frozen=True)
class SecureStore:
    """Attributes: ``folder``, the client's own, of one run; made when first needed."""

    folder: Path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process answers for this client."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "secure-sum.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def state(self, make: Callable[[], SiteState]) -> SiteState:
        """Return the state that is kept; made, and kept, where there is none."""
        path = self.folder / "secure-sum.state"
        if path.exists():
            return SiteState.from_bytes(path.read_bytes())
        made = make()
        self.keep(made)
        return made

    def keep(self, state: SiteState) -> None:
        """Write the state; nobody else may read it."""
        self._write("secure-sum.state", state.to_bytes())

    def used(self) -> UsedUpdates:
        """Return which updates are in a sum."""
        path = self.folder / "secure-sum.used"
        return UsedUpdates.from_bytes(path.read_bytes()) if path.exists() else UsedUpdates()

    def keep_used(self, used: UsedUpdates) -> None:
        """Write which updates are in a sum."""
        self._write("secure-sum.used", used.to_bytes())

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self.folder / name, data, 0o600)
