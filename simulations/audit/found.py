"""What one training of an audit is, and what it has told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.privacy.accountant import DpEvent, with_steps_added
from deal_core.privacy.audit.claim_audit import Repetition
from deal_core.privacy.audit.guesses import Guesses
from deal_core.privacy.events import LedgerEvent
from server.results import Strict

Kind = Literal["gradients", "texts", "sums"]


class Bound(Strict):
    """As :class:`deal_core.privacy.audit.one_run_audit.LowerBound`."""

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
    """As :class:`deal_core.privacy.audit.membership.Membership`."""

    auc: Figure
    true_positives: Figure | None
    members: int
    others: int


class Outcome(Strict):
    """As :class:`deal_core.privacy.audit.guesses.Guesses`."""

    canaries: int
    guesses: int
    correct: int


class Steps(Strict):
    """As :class:`deal_core.privacy.accountant.DpEvent`: what the ledger holds."""

    sample_rate: float
    noise_multiplier: float
    steps: int


class Found(Strict):
    """One audited training.

    Attributes:
        kind: of canaries.
        client, canaries, records, seed, repeat: what was asked for.
        mechanism, unit, unit_column, simulation_only: of the run.
        claimed: epsilon that the site's ledger holds, of everything that was released in all rounds
            and tasks, at ``delta``; None: no guarantee.
        spent: what the ledger holds.
        outcomes: of the guesses, one for every choice of how many.
        assumes: whom the claim takes to be honest; empty: as its unit of privacy says.
        membership: of the site's other records; with texts alone.
    """

    kind: Kind
    client: int
    canaries: int
    records: int
    seed: int
    repeat: int
    mechanism: str
    unit: str | None
    unit_column: str = ""
    simulation_only: bool
    claimed: float | None
    delta: float
    spent: list[Steps]
    outcomes: list[Outcome]
    assumes: str = ""
    membership: Attack | None = None

    @property
    def repetition(self) -> Repetition:
        """For the tests of the claim."""
        spent = tuple(DpEvent(**each.model_dump()) for each in self.spent)
        return Repetition(spent, tuple(Guesses(**each.model_dump()) for each in self.outcomes))


def steps_of(events: Sequence[LedgerEvent]) -> list[Steps]:
    """Return what events cost, equal ones together."""
    return [Steps(**asdict(each)) for each in with_steps_added(event.spent for event in events)]


def outcomes_of(guesses: Sequence[Guesses]) -> list[Outcome]:
    """Return the guesses as the file of an audit holds them."""
    return [Outcome(**asdict(each)) for each in guesses]


@dataclass(frozen=True)
class Training:
    """What one training of an audit is.

    Attributes:
        experiment: complete; ``run.out`` is a folder of its own.
        kind, client, canaries, seed: of the canaries; ``canaries`` of texts is for each task.
        delta: at which epsilon is bounded.
        records: real ones of each task, at most, beside gradient canaries; 0: all.
        repeat: number of the repetition; its coins and its noise are its own.
    """

    experiment: Experiment
    kind: Kind
    client: int
    canaries: int
    seed: int
    delta: float
    records: int = 0
    repeat: int = 0

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.experiment.run.out)
