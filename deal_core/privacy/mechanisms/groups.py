"""Which examples are of one group, where a group is the unit of privacy; samples of groups.

A group comes whole or not at all: all of its examples are in a batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from scipy.special import bdtrc

from deal_core.privacy.mechanisms.guards import IMPOSSIBLE, UnsafeModel


@dataclass(frozen=True)
class Groups:
    """Attributes: ``numbers``, the group of every example, from 0, none left out."""

    numbers: Sequence[int]

    @cached_property
    def members(self) -> list[list[int]]:
        """Positions of the examples of every group, ``[group][example]``."""
        found: dict[int, list[int]] = {}
        for position, number in enumerate(self.numbers):
            found.setdefault(number, []).append(position)
        if sorted(found) != list(range(len(found))):
            raise UnsafeModel("groups that are not numbered from 0")
        return [found[number] for number in range(len(found))]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.members)

    def batch(self, drawn: Sequence[int]) -> list[int]:
        """Return the positions of all examples of the groups that were drawn, each once, those of a
        group one after the other."""
        return [position for number in drawn for position in self.members[number]]

    def require_sampled(self, batch: Sequence[int], sample_rate: float) -> None:
        """Check that a batch can be a Poisson sample of groups of the rate that is charged.

        Args:
            batch: positions in the data.
            sample_rate: probability of a group, as it is charged.

        Raises:
            UnsafeModel: an example is in it twice, a group is in it in part, or it has more groups
                than such a sample ever has (in one of 1e15).
        """
        drawn = {self.numbers[position] for position in batch}
        if len(set(batch)) != len(batch):
            raise UnsafeModel("a record is in a batch twice")
        if sum(len(self.members[number]) for number in drawn) != len(batch):
            raise UnsafeModel("a group is in a batch in part")
        if drawn and bdtrc(len(drawn) - 1, len(self), sample_rate) < IMPOSSIBLE:
            raise UnsafeModel(f"a batch of {len(drawn)} groups is more than the sample rate allows")
