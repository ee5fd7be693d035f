"""Noise in the sum, with canaries at one site, and what the server and some sites see of them.

The attacker is the server with as many other sites as the noise is planned against: what these
send it knows, and takes away. As many others as may fail have failed. So it sees the sum over the
sites that are counted on, which make up the whole noise and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.payload import PREFIX
from deal_core.lora.per_example import ExampleLosses
from deal_core.models.interface import Encoded
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.planted import (
    FAR,
    PlantedObjective,
    Seen,
    overseen,
    records_of_each,
    with_canaries,
)
from deal_core.privacy.distributed_noise import NoisySum, grid_step
from deal_core.privacy.interface import Mechanism, UpdateRequest
from deal_core.protection import shares_of

Total = Mapping[str, NDArray[Any]]
Place = tuple[str, str, int, int]
"""Task, phase, stage and round of a sum."""


def counted_sites(experiment: Experiment, attacked: int) -> tuple[str, ...]:
    """Return the sites whose noise hides the attacked one's records: itself, first, and as many
    others as its plan counts on."""
    others = [k for k in range(experiment.federation.clients) if k != attacked]
    return tuple(str(k) for k in (attacked, *others[: shares_of(experiment) - 1]))


@dataclass
class SeenSums(Seen):
    """Adds up what the attacker sees of the canaries in sums over sites, as the attacked site plans
    them.

    Attributes:
        counted: sites in the sum that is seen; the first is the attacked one.
        open: sums that not all sites have given their part of. scored: how many were whole.
    """

    counted: tuple[str, ...] = ()
    open: dict[Place, dict[str, Total]] = field(default_factory=dict)
    scored: int = 0
    _plan: dict[Place, tuple[float, float]] = field(default_factory=dict)

    def take(self, client: str, place: Place, part: Total, sum_of: NoisySum) -> None:
        """Take a site's part of a sum, and score the sum when it is whole."""
        if client not in self.counted:
            return
        parts = self.open.setdefault(place, {})
        parts[client] = part
        if client == self.counted[0]:  # as it plans, whatever the others do
            self._plan[place] = sum_of.sample_rate, sum_of.noise_multiplier
        if len(parts) == len(self.counted):
            self.scored += 1
            whole = _added(list(self.open.pop(place).values()))
            self.add(whole, grid_step(1.0), *self._plan.pop(place))


def _added(parts: Sequence[Total]) -> Mapping[str, Tensor]:
    """The sum over sites, by the names of factors."""
    return {
        key.removeprefix(PREFIX).removesuffix(".weight"): torch.from_numpy(
            np.sum([part[key] for part in parts], axis=0, dtype=np.float64)
        )
        for key in parts[0]
    }


@dataclass(frozen=True)
class PlantedSum:
    """One noisy sum of a site, with the attacker, who sees it among the others.

    Attributes:
        inner: the mechanism's, of records and canaries.
        records: positions below are records, those from there on canaries.
        each: positions that a canary has.
        canaries: of the attacked site; None: of another one.
        see: is told of the sum.
    """

    inner: NoisySum
    records: int
    each: int
    canaries: GradientCanaries | None
    see: Callable[[Total, NoisySum], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def data(self) -> Sequence[Encoded]:
        """The records: canaries are no texts."""
        return self.inner.data[: self.records]

    def total(self, module: nn.Module, objective: ExampleLosses) -> dict[str, NDArray[np.int64]]:
        """Return the sum of records and canaries, and show it to the attacker."""
        if self.canaries is not None:
            length = FAR * self.inner.max_grad_norm
            objective = PlantedObjective(
                objective, module, self.records, self.canaries, length, self.each
            )
        total = self.inner.total(module, objective)
        self.see(total, self.inner)
        return total


def plant_in_sum(
    inner: Mechanism, canaries: GradientCanaries, counted: tuple[str, ...]
) -> tuple[Mechanism, SeenSums]:
    """Return a mechanism with canaries at one of the sites that share it, and the attacker.

    Args:
        inner: the mechanism itself.
        canaries: their directions, and which of them are there.
        counted: see :class:`SeenSums`; the first site is attacked.
    """
    seen, each = SeenSums(canaries, np.zeros(canaries.count), counted), records_of_each(inner)

    def asked(ask: UpdateRequest) -> UpdateRequest:
        return with_canaries(ask, canaries.count, each) if ask.client == counted[0] else ask

    def change(ask: UpdateRequest, given: NoisySum) -> PlantedSum:
        place = ask.task, ask.phase, ask.stage, ask.server_round
        planted = canaries if ask.client == counted[0] else None
        return PlantedSum(
            given, len(ask.data), each, planted, partial(seen.take, ask.client, place)
        )

    return overseen(inner, change, asked), seen


def require_gradients_in_sum(experiment: Experiment) -> None:
    """Check that what is summed has gradients to plant canaries in.

    Raises:
        UserError: it is of embeddings.
    """
    if experiment.method.name == "prototype":
        raise UserError(
            "an audit plants its canaries in gradients, but method.name 'prototype' adds up "
            "embeddings; audit an experiment that adds up gradients, with noise of the same kind: "
            "deal audit private"
        )
