"""What the repetitions of one attack show together, and what they could have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from deal_core.privacy.audit.audit_power import audit_power
from deal_core.privacy.audit.claim_audit import claim_p_value, least_refuted
from deal_core.privacy.audit.guesses import ALL
from deal_core.privacy.audit.one_run_audit import CONFIDENCE, lower_bound
from server.results import Strict
from simulations.audit.found import Attack, Bound, Found, Kind


class Refuted(Strict):
    """As :class:`deal_core.privacy.audit.claim_audit.LeastRefuted`."""

    scale: float
    epsilon: float
    delta: float


class Notices(Strict):
    """What such an audit notices in at least 80 % of all cases.

    Attributes:
        scale: noise times this, or less; 0: nothing.
        efficiency: of this attack: how much more than half of all coins it guessed rightly, in
            units of what the best attack on the claimed mechanism does. Where the mechanism is
            as claimed, 1 says that no better one could be built.
    """

    scale: float
    efficiency: float


class Judged(Strict):
    """One kind of canaries under one budget.

    Attributes:
        p_value: of the claim: probability, at most, of guesses as right as these if the ledger is
            true; None: nothing was claimed.
        bound: the lower bound that assumes nothing of the mechanism.
        least_refuted: the least noise that is refuted; None: none is, or nothing was claimed.
        notices: None: nothing was claimed, or texts, whose best attack nobody knows.
    """

    kind: Kind
    bound: Bound
    p_value: float | None
    least_refuted: Refuted | None
    notices: Notices | None
    membership: Attack | None
    trainings: list[Found]

    @property
    def claimed(self) -> float | None:
        """The largest of the repetitions', which may differ in the last digits."""
        claims = [each.claimed for each in self.trainings if each.claimed is not None]
        return max(claims, default=None)

    @property
    def refuted(self) -> bool:
        """Has the claim been shown to be wrong?"""
        if self.claimed is None:
            return False
        improbable = self.p_value is not None and self.p_value < 1 - CONFIDENCE
        return improbable or self.bound.epsilon > self.claimed


def judged(trainings: Sequence[Found]) -> Judged:
    """Judge all repetitions of one attack under one budget."""
    first = trainings[0]
    repetitions = [each.repetition for each in trainings]
    private = all(each.spent for each in trainings)
    least = least_refuted(repetitions, first.delta) if private else None
    bound = lower_bound([each.outcomes for each in repetitions], first.delta)
    return Judged(
        kind=first.kind,
        bound=Bound(**asdict(bound)),
        p_value=claim_p_value(repetitions) if private else None,
        least_refuted=Refuted(**asdict(least)) if least else None,
        notices=_notices(trainings) if private and first.kind != "texts" else None,
        membership=first.membership,
        trainings=list(trainings),
    )


def _notices(trainings: Sequence[Found]) -> Notices:
    first, every = trainings[0], [each.outcomes[ALL] for each in trainings]
    power = audit_power(first.repetition.spent, every[0].canaries, len(trainings), first.seed)
    accuracy = sum(each.correct for each in every) / sum(each.guesses for each in every)
    return Notices(scale=power.scale, efficiency=(accuracy - 0.5) / (power.accuracy - 0.5))
