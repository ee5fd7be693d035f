"""Which update was masked for which round: no update is in two sums.

Two sums over different sites, of the same updates, would tell the difference: one site's own. A
site cannot know which of its rounds came to a sum. So a place in a run (a phase, stage and round
of it) is masked once: for no other round, not even after one that failed, and with no other update,
or a server could ask for one that differs by next to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from deal_core.secure_sum.protocol_error import UsedUpdate


@dataclass(frozen=True)
class UsedUpdates:
    """Attributes: ``masked``, place in the run to the digest of its round's terms, in hexadecimal,
    and the name of the update."""

    masked: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def masking(self, context: bytes, place: str, update: str) -> UsedUpdates:
        """Return the record after the update of a place in the run was masked for a round; the same
        again is the same.

        Raises:
            UsedUpdate: the place was masked for another round, or with another update.
        """
        wanted = context.hex(), update
        if self.masked.get(place, wanted) != wanted:
            raise UsedUpdate(
                f"{place}: this site has masked its update for a sum already, and a second sum "
                "would tell the difference; nothing was sent"
            )
        return UsedUpdates({**self.masked, place: wanted})

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(dict(self.masked)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> UsedUpdates:
        """Return the record of the bytes."""
        masked: dict[str, list[str]] = json.loads(data)
        return UsedUpdates({place: (known[0], known[1]) for place, known in masked.items()})
