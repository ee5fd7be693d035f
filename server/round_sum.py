"""What a round adds up in a secure sum, and what becomes of it: the seam between the protocol and
the kinds of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from deal_core.aggregation import Aggregate
from deal_core.lora.state import State
from deal_core.secure_sum.layout import Layout

Sums = Mapping[str, NDArray[Any]]
"""Name of a field of the layout to its sum over sites."""


class RoundSum(Protocol):
    """The sum of one round."""

    @property
    def trained(self) -> frozenset[str]:
        """Factors that learn; none where nothing is trained."""

    def clients(self) -> dict[str, str]:
        """Return whom to ask, and for which task."""

    def layout(self, state: State, basis: str) -> Layout:
        """Return the layout of what each of them gives, from the state that the round begins
        from; ``basis``: what all of them must be told alike."""

    def add(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state after the round, and what was aggregated; ``members``: how many were to
        give theirs; ``given``: the clients that are in the sum."""
