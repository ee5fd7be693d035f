"""The audit of a mechanism by itself, in this process: no server, no wire, a few real records.

What is audited is what a site runs: the mechanism plans, opens its ledger, samples, has gradients
computed in the real backward pass, clips, adds noise and charges. Only what a server would send is
left out. It takes seconds, so that tests can ask it about mechanisms that were weakened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deal_core.config.experiment import Experiment
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, write
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.audit.audited import steps_of
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.claim_audit import Repetition, claim_p_value
from deal_core.privacy.audit.guesses import guess
from deal_core.privacy.audit.one_run_audit import CONFIDENCE, LowerBound, lower_bound
from deal_core.privacy.audit.planted import GROUP_RECORDS, Attacked, Scores, plant
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


@dataclass(frozen=True)
class MechanismAudit:
    """What was found.

    Attributes:
        p_value: probability, at most, of guesses as right as these if the ledgers are true.
        bound: on epsilon, whatever the mechanism is.
        claimed: epsilon that the ledger of the first repetition holds, at ``delta`` per record (or
            group), over all rounds.
        repetitions: guesses, and what each ledger holds.
    """

    p_value: float
    bound: LowerBound
    claimed: float
    delta: float
    repetitions: tuple[Repetition, ...]

    @property
    def refuted(self) -> bool:
        """Has the claim been shown to be wrong, with 95 % confidence?"""
        return self.p_value < 1 - CONFIDENCE or self.bound.epsilon > self.claimed


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
    make: Callable[[Experiment], Mechanism] = make_mechanism,
    canaries: int = 1000,
    repetitions: int = 4,
    seed: int = 0,
    group_records: int = GROUP_RECORDS,
) -> MechanismAudit:
    """Train with canaries, several times, and judge.

    Args:
        experiment: rounds, training, and what is claimed: ``privacy.mechanism`` is ``record``;
            ``privacy.sample_rate`` and ``privacy.target_delta`` should be set, since both depend
            on the number of records otherwise, canaries included.
        records: the real ones, beside which the canaries lie.
        folder: gets a ledger for each repetition; empty.
        make: builds the mechanism, weakened or not.
        canaries: in each repetition; :mod:`deal_core.privacy.audit.audit_power` says what so many
            can notice.
        repetitions: trainings, each with canaries of its own.
        seed: of the canaries.
        group_records: records of each canary, where the experiment protects groups.

    Returns:
        How likely such guesses are if the ledgers are true, and the bound that they give on
        epsilon.

    Raises:
        Refusal: the mechanism takes no part.
        UserError: more canaries than there is room for.
    """
    before = read(records.model.module)
    done: list[Repetition] = []
    ledgers = [Ledger(folder / f"repetition-{k}") for k in range(repetitions)]
    for k, ledger in enumerate(ledgers):
        directions = GradientCanaries(canaries, seed, k)
        own = with_seed(experiment, experiment.run.seed + k)
        scores = _trained(make(own), own, records, ledger, directions, group_records)
        write(records.model.module, before)
        spent = tuple(event.spent for event in ledger.events())
        done.append(Repetition(spent, guess(scores, directions.included)))
    return judged(done, ledgers[0])


def judged(done: Sequence[Repetition], ledger: Ledger) -> MechanismAudit:
    """Return what repetitions come to.

    Args:
        done: guesses of each, and what was spent.
        ledger: of the first, whose claim is judged.
    """
    events = ledger.events()
    delta = events[0].delta
    return MechanismAudit(
        p_value=claim_p_value(done),
        bound=lower_bound([each.outcomes for each in done], delta),
        claimed=composed(events, delta),
        delta=delta,
        repetitions=tuple(done),
    )


def with_seed(experiment: Experiment, seed: int) -> Experiment:
    """Return the experiment with another seed."""
    return experiment.model_copy(update={"run": experiment.run.model_copy(update={"seed": seed})})


def _trained(
    mechanism: Mechanism,
    experiment: Experiment,
    records: Records,
    ledger: Ledger,
    canaries: GradientCanaries,
    group_records: int,
) -> Scores:
    """All rounds of one repetition; return how the canaries look, ``(count,)``."""
    bound = experiment.privacy.max_grad_norm
    attacked: Attacked = "steps" if experiment.privacy.mechanism == "record" else "updates"
    planted, seen = plant(attacked, mechanism, canaries, bound, group_records)
    site = Site(ledger=lambda: ledger, policy=None, simulated=True)
    trained = mechanism.trained(frozenset({"lora_A", "lora_B"}))

    def make(given: Gradients | GradientSum) -> LocalUpdate:
        gradients = steps_of(given)
        objective = Plain(records.model, records.labels, gradients.data)
        run_local_steps(records.model, objective, gradients, trained, experiment.train)
        gradients.finished(records.model, records.labels, records.data[:2])
        return LocalUpdate({}, {})

    for server_round in range(1, experiment.federation.rounds + 1):
        release(planted, audit_request(experiment, records, server_round), site, make)
    return seen.total


def audit_request(experiment: Experiment, records: Records, server_round: int) -> UpdateRequest:
    """Return one round as the mechanism under audit sees it."""
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
        learning_rate=experiment.train.learning_rate,
        generator=seeded(experiment.run.seed, "train", server_round),
        grouping=Grouping(numbers, lambda: {TASK: count}, lambda: count),
    )
