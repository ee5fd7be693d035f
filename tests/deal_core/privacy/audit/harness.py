"""The audit of a mechanism by itself, in this process: no server, no wire, a few real records.

What is audited is what a site runs: the mechanism plans, opens its ledger, samples, has gradients
computed in the real backward pass, clips, adds noise and charges. Only what a server would send is
left out. Of noise in the sum the attacker is the server with as many other sites as the noise is
planned against; the masks are left out: the sum is all that they let through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.audit.canaries import GradientCanaries, Scores
from deal_core.privacy.audit.claim import (
    SIGNIFICANCE,
    LowerBound,
    Repetition,
    claim_p_value,
    guess,
    lower_bound,
)
from deal_core.privacy.audit.planted import overseen, plant
from deal_core.privacy.audit.planted_sum import plant_in_sum
from deal_core.privacy.events import composed
from deal_core.privacy.interface import (
    Gradients,
    GradientSum,
    Grouping,
    LocalUpdate,
    Mechanism,
    RecordId,
    Site,
    UpdateRequest,
    release,
)
from deal_core.privacy.ledger import Ledger
from deal_core.protection import make_mechanism
from deal_core.randomness import seeded
from deal_core.training.loop import run_local_steps
from deal_core.wire.instruction import LEARN

TASK = "audited"
FACTORS = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True)
class MechanismAudit:
    """What was found; ``claimed``: epsilon of the first repetition's ledger."""

    p_value: float
    bound: LowerBound
    claimed: float
    repetitions: tuple[Repetition, ...]

    @property
    def refuted(self) -> bool:
        return self.p_value < SIGNIFICANCE


@dataclass(frozen=True)
class Records:
    """The site: a ``model`` with an adapter, and real records, encoded, with their ``labels``, and
    the ``groups`` of which they are, numbers from 0; empty: each is one by itself."""

    model: LanguageModel
    data: Sequence[Encoded]
    labels: Sequence[str]
    groups: Sequence[int] = ()


def audit_mechanism(
    experiment: Experiment,
    records: Records,
    folder: Path,
    *,
    canaries: int = 1000,
    repetitions: int = 4,
) -> MechanismAudit:
    """Train with canaries, several times, and judge."""
    before = read(records.model.module)

    def scores(own: Experiment, k: int, directions: GradientCanaries) -> Scores:
        found = _trained(own, records, Ledger(folder / f"repetition-{k}"), directions)
        write(records.model.module, before)
        return found

    ledgers = [Ledger(folder / f"repetition-{k}") for k in range(repetitions)]
    return _judged(experiment, ledgers, canaries, scores)


def audit_sum(
    experiment: Experiment,
    records: Records,
    folder: Path,
    *,
    canaries: int = 1000,
    repetitions: int = 4,
    silent: int = 0,
) -> MechanismAudit:
    """Play the rounds of noise in the sum several times, and judge; ``silent`` of the honest sites,
    beside the attacked one, leave their noise out."""

    def scores(own: Experiment, k: int, directions: GradientCanaries) -> Scores:
        return _summed(own, records, folder / f"repetition-{k}", directions, silent)

    ledgers = [Ledger(folder / f"repetition-{k}" / "0") for k in range(repetitions)]
    return _judged(experiment, ledgers, canaries, scores)


def _judged(
    experiment: Experiment,
    ledgers: Sequence[Ledger],
    canaries: int,
    scores: Callable[[Experiment, int, GradientCanaries], Scores],
) -> MechanismAudit:
    done: list[Repetition] = []
    for k, ledger in enumerate(ledgers):
        directions = GradientCanaries(canaries, 0, k)
        run = experiment.run.model_copy(update={"seed": experiment.run.seed + k})
        seen = scores(experiment.model_copy(update={"run": run}), k, directions)
        spent = tuple(event.spent for event in ledger.events())
        done.append(Repetition(spent, guess(seen, directions.included)))
    events = ledgers[0].events()
    delta = events[0].delta
    return MechanismAudit(
        p_value=claim_p_value(done),
        bound=lower_bound(done, delta),
        claimed=composed(events, delta),
        repetitions=tuple(done),
    )


def _trained(
    experiment: Experiment, records: Records, ledger: Ledger, canaries: GradientCanaries
) -> Scores:
    planted, seen = plant(make_mechanism(experiment), canaries)
    site = Site(ledger=lambda: ledger, policy=None, simulated=True)
    trained = planted.trained(FACTORS)

    def make(gradients: Gradients | GradientSum) -> LocalUpdate:
        objective = Plain(records.model, records.labels, gradients.data)
        run_local_steps(records.model, objective, gradients, trained, experiment.train)
        gradients.finished(records.model, records.labels, records.data[:2])
        return LocalUpdate({}, {})

    for server_round in range(1, experiment.federation.rounds + 1):
        release(planted, request(experiment, records, server_round), site, make)
    return seen.total


def _summed(
    experiment: Experiment,
    records: Records,
    folder: Path,
    canaries: GradientCanaries,
    silent: int,
) -> Scores:
    module = records.model.module
    honest = tuple(
        str(k) for k in range(experiment.federation.clients - experiment.privacy.colluding)
    )
    mechanism = _muted(make_mechanism(experiment), honest[1 : 1 + silent])
    planted, seen = plant_in_sum(mechanism, canaries, honest)
    objective: Any = Plain(records.model, records.labels, records.data)
    learning = set_trainable(module, mechanism.trained(FACTORS))
    entries = sum(factor.numel() for factor in learning)

    def make(given: Gradients | GradientSum) -> LocalUpdate:
        assert isinstance(given, GradientSum)
        return LocalUpdate(given.total(module, objective), {"num_examples": 1.0})

    for server_round in range(1, experiment.federation.rounds + 1):
        ask = request(experiment, records, server_round)
        for client in honest:
            site = Site(partial(Ledger, folder / client), policy=None, simulated=True)
            release(planted, replace(ask, client=client, entries=entries), site, make)
    assert not seen.open
    return seen.total


def _muted(inner: Mechanism, silent: tuple[str, ...]) -> Mechanism:
    """A mechanism that some sites, which are named, have broken: they add no noise."""
    return overseen(
        inner,
        lambda ask, own: replace(own, noise_multiplier=0.0) if ask.client in silent else own,
    )


def request(experiment: Experiment, records: Records, server_round: int) -> UpdateRequest:
    """One round as the mechanism under audit sees it."""
    numbers = records.groups or range(len(records.data))
    count = len(set(numbers))
    return UpdateRequest(
        request=f"audit {server_round}",
        client="0",
        task=TASK,
        phase=LEARN,
        stage=1,
        server_round=server_round,
        data=records.data,
        record_ids=[RecordId(TASK, k) for k in range(len(records.data))],
        site_records=lambda: len(records.data),
        records=lambda: {TASK: len(records.data)},
        ids=lambda: [f"record {k}" for k in range(len(records.data))],
        generator=seeded(experiment.run.seed, "train", server_round),
        grouping=Grouping(numbers, lambda: {TASK: count}, lambda: count),
    )
