"""What a privacy mechanism does at the server: who takes part, how updates become one, what is
charged. Where clients protect themselves it does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from deal_core.aggregation import Aggregation, AggregationRule
from deal_core.config.experiment import Experiment
from deal_core.lora.adapter import Adapter
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.randomness import seeded


@dataclass(frozen=True)
class RoundContext:
    """Where in the run a round is, and how many clients had a task in it."""

    phase: str
    stage: int
    server_round: int
    eligible: int


class ServerSide(Protocol):
    """A mechanism's part at the server, for one experiment.

    Attributes:
        releases_noise: whether a round that nobody answers changes the model all the same.
    """

    @property
    def releases_noise(self) -> bool:
        """Whether a round that nobody answers changes the model all the same."""

    def sample(self, names: Sequence[str], stage: int, server_round: int) -> list[str]:
        """Who of those that have a task takes part, in their order."""

    def begin(
        self, rule: AggregationRule, before: Adapter, trained: frozenset[str], place: RoundContext
    ) -> Aggregation:
        """Start a round.

        Args:
            rule: the experiment's.
            before: what every client begins from.
            trained: factors that may differ from it.
            place: of the round in the run.
        """

    def spent(self, clients: Sequence[str], eligible: int) -> Mapping[str, Mapping[str, float]]:
        """Client to what the rounds so far have cost it, in the names of a client's own figures;
        empty: the server knows only what clients say. ``eligible``: how many had a task in the
        latest round."""


@dataclass(frozen=True)
class NoServerNoise:
    """The server averages what it is sent."""

    experiment: Experiment
    releases_noise: bool = False

    def sample(self, names: Sequence[str], stage: int, server_round: int) -> list[str]:
        """A seeded choice of ``clients_per_round`` over the stable names."""
        wanted = self.experiment.federation.clients_per_round or len(names)
        generator = seeded(self.experiment.run.seed, "sample", stage, server_round)
        order = torch.randperm(len(names), generator=generator)[:wanted].tolist()
        return [names[i] for i in sorted(order)]

    def begin(
        self, rule: AggregationRule, before: Adapter, trained: frozenset[str], place: RoundContext
    ) -> Aggregation:
        """The rule's own."""
        return rule.begin(before, place.server_round)

    def spent(self, clients: Sequence[str], eligible: int) -> Mapping[str, Mapping[str, float]]:
        """Return nothing: the server knows only what clients say."""
        return {}


MakeServerSide = Callable[[Experiment, int, Ledger], ServerSide]
"""Of an experiment, its rounds (at most, in which private data are learnt from), and the server's
own ledger."""


def no_server_noise(experiment: Experiment, rounds: int, ledger: Ledger) -> ServerSide:
    """Build the side of a server that averages what it is sent."""
    return NoServerNoise(experiment)
