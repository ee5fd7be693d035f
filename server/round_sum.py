"""What a round adds up in a secure sum, and what becomes of it: the seam between the protocol and
the kinds of a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from deal_core.aggregation import Aggregate
from deal_core.lora.state import State
from deal_core.secure_sum.layout import Layout
from server.checkpoint import History

Sums = Mapping[str, NDArray[Any]]
"""Name of a field of the layout to its sum over sites."""


class RoundSum(Protocol):
    """The sum of one round."""

    @property
    def trained(self) -> frozenset[str]:
        """Factors that learn; none where nothing is trained."""

    def clients(self, history: History) -> dict[str, str]:
        """Return whom to ask, and for which task."""

    def layout(self, state: State, basis: str) -> Layout:
        """Return the layout of what each of them gives, from the state that the round begins
        from; ``basis``: what all of them must be told alike."""

    def add(self, state: State, sums: Sums) -> tuple[State, Aggregate | None]:
        """Return the state after the round, and what was aggregated."""

    def noted(self, history: History, summed: Mapping[str, str]) -> History:
        """Return the history with whom the sum is of: client to task."""
