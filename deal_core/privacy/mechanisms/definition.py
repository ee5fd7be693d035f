"""What a privacy mechanism is: one record, with all that the rest of the project asks about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.privacy.interface import MakeMechanism

Attacked = Literal["updates", "steps"]


def no_conflict(experiment: Experiment) -> None:
    """Accept every experiment."""


def nobody_trusted(privacy: PrivacyConfig) -> str:
    """Return whom an epsilon of the mechanism takes to be honest."""
    return "nobody outside the client is trusted"


@dataclass(frozen=True)
class MechanismDefinition:
    """One privacy mechanism. What may leave with an update is the same for all: see
    :mod:`client.egress`.

    Attributes:
        client: builds its part at a client.
        check: raises :class:`~deal_core.errors.UserError` for an experiment that it cannot protect.
        assumes: whom its epsilon takes to be honest; empty: there is no epsilon.
        attacked: what the canaries of an audit are planted in: the updates of a site, or the steps
            of DP-SGD.
        needs_float32: whether gradients must be computed in float32.
        noises_counts: whether counts of right answers can leave with noise, charged.
    """

    client: MakeMechanism
    attacked: Attacked
    check: Callable[[Experiment], None] = no_conflict
    assumes: Callable[[PrivacyConfig], str] = nobody_trusted
    needs_float32: bool = False
    noises_counts: bool = False
