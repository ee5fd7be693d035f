"""Which update was masked for which round: no update is in two sums.

Two sums over different sites, of the same updates, would tell the difference: one site's own. A
site cannot know which of its rounds came to a sum, so an update that was masked once is masked for
no other round, not even after one that failed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from deal_core.secure_sum.protocol_error import ProtocolError


@dataclass(frozen=True)
class UsedUpdates:
    """Attributes: ``rounds``, name of an update to the digest of its round's terms, in
    hexadecimal."""

    rounds: Mapping[str, str] = field(default_factory=dict)

    def masking(self, context: bytes, update: str) -> UsedUpdates:
        """Return the record after an update was masked for a round.

        Raises:
            ProtocolError: it was masked for another one.
        """
        place = context.hex()
        if self.rounds.get(update, place) != place:
            raise ProtocolError(
                "an update of this site was masked for another round, and would be told by a "
                "second sum"
            )
        return UsedUpdates({**self.rounds, update: place})

    def to_bytes(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(dict(self.rounds)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> UsedUpdates:
        """Return the record of the bytes."""
        return UsedUpdates(json.loads(data))
