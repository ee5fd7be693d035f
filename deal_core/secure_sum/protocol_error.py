"""What ends a leg of the protocol: one line that names sites and rules, and never a value."""

from __future__ import annotations

from deal_core.errors import UserError


class ProtocolError(UserError):
    """A message or a request that is refused. The state stays as it was, and nothing is revealed.

    Attributes:
        site: whose message it is, where one site is to blame; empty otherwise.
    """

    def __init__(self, line: str, site: bytes = b"") -> None:
        super().__init__(line)
        self.site = site


class BelowThreshold(ProtocolError):
    """Fewer sites are left than a sum needs: the round ends without one."""
