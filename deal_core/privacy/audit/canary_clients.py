"""Canary clients: made-up clients that mechanism ``client`` must hide as well as any real one.

A canary always sends the same update, a random direction far longer than the bound. Where its coin
says so it is one of the clients of a run: drawn, clipped and summed by the server's own code. No
client could do worse. It then shows by how far the models that are handed out went along its
direction. Clients with data take no part: what they add can only hide the canaries.

Source: Steinke, Nasr & Jagielski, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deal_core.aggregation import ClientUpdate
from deal_core.aggregation.means import FedIt
from deal_core.lora.adapter import Adapter
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.planted import FAR, likelihood_ratio
from deal_core.privacy.mechanisms.central_dp import CentralDP
from deal_core.privacy.mechanisms.clipped_mean import factors_of, moved
from deal_core.privacy.mechanisms.server_side import RoundContext, ServerSide


@dataclass(frozen=True)
class CanaryClients:
    """Attributes: ``canaries``, directions and coins; ``bound``, of an update."""

    canaries: GradientCanaries
    bound: float

    def scores(
        self,
        side: ServerSide,
        before: Adapter,
        trained: Callable[[int], frozenset[str]],
        rounds: Sequence[RoundContext],
    ) -> NDArray[np.float64]:
        """Play a run, and score every canary.

        Args:
            side: the mechanism at the server, as a run has it.
            before: what the first round begins from.
            trained: factors of a round, from its number.
            rounds: of the whole run; how many clients there might have been is public.

        Returns:
            How much each looks as if it had been there, ``(count,)``: as
            :class:`~deal_core.privacy.audit.planted.NoisedSteps` has it, or, without noise, how far
            the run went along it.

        Raises:
            UserError: the budget is spent.
        """
        scores = np.zeros(self.canaries.count)
        for place in rounds:
            factors = trained(place.server_round)
            after = self._round(side, before, factors, place)
            start, end = factors_of(before, factors), factors_of(after, factors)
            along = self.canaries.scores({name: end[name] - start[name] for name in start})
            scores += _told(along / self.bound, side, place)
            before = after
        return scores

    def _round(
        self, side: ServerSide, before: Adapter, trained: frozenset[str], place: RoundContext
    ) -> Adapter:
        """Return the adapter after one round of those that are in, and drawn; whatever rule follows
        the sum, the plain mean shows as much."""
        names = [str(number) for number in np.flatnonzero(self.canaries.included)]
        drawn = side.sample(names, place.stage, place.server_round)
        if not drawn and not side.releases_noise:
            return before
        aggregation = side.begin(FedIt(), before, trained, place)
        for name in drawn:
            direction = self.canaries.direction(int(name), factors_of(before, trained))
            change = {key: FAR * self.bound * part.double() for key, part in direction.items()}
            aggregation.add(ClientUpdate(name, moved(before, change), 1.0))
        return aggregation.finish().current


def _told(along: NDArray[np.float64], side: ServerSide, place: RoundContext) -> NDArray[np.float64]:
    if not isinstance(side, CentralDP):
        return along
    expected = side.sample_rate * place.eligible
    return likelihood_ratio(expected * along, side.sample_rate, side.plan.noise_multiplier)
