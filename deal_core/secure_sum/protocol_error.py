"""What ends a leg of the protocol: one line that names sites and rules, and never a value."""

from __future__ import annotations

from typing import ClassVar

from deal_core.errors import UserError


class ProtocolError(UserError):
    """A message or a request that is refused. The state stays as it was, and nothing is revealed.

    Attributes:
        site: whose message it is, where one site is to blame; empty otherwise.
        code: the fixed word that a site may tell; the line stays there.
    """

    code: ClassVar[str] = "protocol"

    def __init__(self, line: str, site: bytes = b"") -> None:
        super().__init__(line)
        self.site = site


class BelowThreshold(ProtocolError):
    """Fewer sites are left than a sum needs: the round ends without one."""


class UnpinnedPeer(ProtocolError):
    """A site of the round is not among those that this one has pinned."""

    code = "unpinned"


class UsedUpdate(ProtocolError):
    """The update of a round is in another sum already."""

    code = "masked"
