"""What one training of an audit is, and what it has told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deal_core.config import Experiment
from server.results import Strict

Kind = Literal["gradients", "texts", "clients"]


class Bound(Strict):
    """As :class:`deal_core.privacy.one_run_audit.LowerBound`."""

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int


class Figure(Strict):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Attack(Strict):
    """As :class:`deal_core.privacy.membership.Membership`."""

    auc: Figure
    true_positives: Figure | None
    members: int
    others: int


class Found(Strict):
    """One audited training.

    Attributes:
        kind: of canaries.
        client, canaries, seed: what was asked for; canary clients take the place of all clients.
        mechanism, unit, simulation_only: of the run.
        claimed: epsilon that the ledger holds (the site's, or the server's), of everything that was
            released in all rounds and tasks, at ``delta``; None: no guarantee.
        bound: what the canaries refute.
        membership: of the site's other records; with texts alone.
    """

    kind: Kind
    client: int
    canaries: int
    seed: int
    mechanism: str
    unit: str | None
    simulation_only: bool
    claimed: float | None
    delta: float
    bound: Bound
    membership: Attack | None = None

    @property
    def refuted(self) -> bool:
        """Has the claim been shown to be wrong?"""
        return self.claimed is not None and self.bound.epsilon > self.claimed


@dataclass(frozen=True)
class Training:
    """What one training of an audit is.

    Attributes:
        experiment: complete; ``run.out`` is a folder of its own.
        kind, client, canaries, seed: of the canaries; ``canaries`` of texts is for each task.
        delta: at which epsilon is bounded.
    """

    experiment: Experiment
    kind: Kind
    client: int
    canaries: int
    seed: int
    delta: float

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.experiment.run.out)
