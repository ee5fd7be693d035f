"""The audit of a mechanism by itself, in this process: no server, no wire, a few real records.

What is audited is what a site runs: the mechanism plans, opens its ledger, samples, has gradients
computed in the real backward pass, clips, adds noise and charges. Only what a server would send is
left out. Of noise in the sum the attacker is the server with as many other sites as the noise is
planned against; the masks are left out: the sum is all that they let through.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from deal_core.config.experiment import Experiment, at_server
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.events import composed
from deal_core.privacy.interface import LocalUpdate, RecordId, Site, UpdateRequest
from deal_core.privacy.ledger import Ledger
from deal_core.protection import make_mechanism
from deal_core.training.loop import run_local_steps
from deal_core.wire.instruction import LEARN
from simulations.audit.canaries import GradientCanaries, Overseen, Scores, plant
from simulations.audit.claim import LowerBound, Repetition, claim_p_value, guess, lower_bound

TASK, LABELS = "audited", ("heart", "skin")
FACTORS = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True)
class MechanismAudit:
    """What was found; ``claimed``: epsilon of the first repetition's ledger, at ``delta``."""

    repetitions: Sequence[Repetition]
    claimed: float
    delta: float

    @cached_property
    def p_value(self) -> float:
        return claim_p_value(self.repetitions)

    @cached_property
    def bound(self) -> LowerBound:
        return lower_bound(self.repetitions, self.delta)


@dataclass(frozen=True)
class Records:
    """The site: a model with an adapter, and real records, encoded, with the number of each one's
    group."""

    model: LanguageModel
    data: Sequence[Encoded]
    groups: Sequence[int]


def six_records(experiment: Experiment, groups: Sequence[int] = (0, 1, 0, 2, 1, 0)) -> Records:
    model = load_model(experiment.model, experiment.adapter, 32, torch.float32)
    data = [Encoded((101, 2540 + i, 102), i % 2) for i in range(len(groups))]
    return Records(model, data, groups)


def audit_mechanism(
    experiment: Experiment,
    records: Records,
    folder: Path,
    *,
    canaries: int,
    repetitions: int,
    silent: int = 0,
) -> MechanismAudit:
    """Train with canaries, several times, and judge; where the noise is in a sum ``silent`` of the
    honest sites, beside the attacked one, leave their noise out."""
    before, done = read(records.model.module), []
    for k in range(repetitions):
        directions, at = GradientCanaries(canaries, 0, k), folder / f"repetition-{k}"
        run = experiment.run.model_copy(update={"seed": experiment.run.seed + k})
        own = experiment.model_copy(update={"run": run})
        if at_server(experiment):
            seen = _summed(own, records, at, directions, silent)
        else:
            seen = _trained(own, records, at, directions)
        write(records.model.module, before)
        spent = tuple(event.spent for event in Ledger(at / "0").events())
        done.append(Repetition(spent=spent, outcomes=guess(seen, directions.included)))
    first = Ledger(folder / "repetition-0" / "0").events()
    return MechanismAudit(done, composed(first, first[0].delta), first[0].delta)


def _trained(
    experiment: Experiment, records: Records, folder: Path, canaries: GradientCanaries
) -> Scores:
    planted, seen = plant(make_mechanism(experiment), canaries)
    trained = planted.trained(FACTORS)

    def make(gradients) -> LocalUpdate:
        objective = Plain(records.model, LABELS, gradients.data)
        run_local_steps(records.model, objective, gradients, trained, experiment.train)
        gradients.finished(records.model, LABELS, records.data[:2])
        return LocalUpdate({}, {})

    for server_round in range(1, experiment.federation.rounds + 1):
        planted.update(_request(experiment, records, server_round), _site(folder, "0"), make)
    return seen.total


def _summed(
    experiment: Experiment,
    records: Records,
    folder: Path,
    canaries: GradientCanaries,
    silent: int,
) -> Scores:
    module, mechanism = records.model.module, make_mechanism(experiment)
    sites = experiment.federation.clients - experiment.privacy.colluding
    honest = tuple(map(str, range(sites)))

    def broken(ask, train):
        """Some sites add no noise."""
        mute = ask.client in honest[1 : 1 + silent]
        return (lambda given: train(replace(given, noise_multiplier=0.0))) if mute else train

    planted, seen = plant(Overseen(mechanism, broken), canaries, honest)
    objective = Plain(records.model, LABELS, records.data)
    learning = set_trainable(module, mechanism.trained(FACTORS))
    entries = sum(factor.numel() for factor in learning)

    def make(given) -> LocalUpdate:
        return LocalUpdate(given.total(module, objective), {"num_examples": 1.0})

    for server_round in range(1, experiment.federation.rounds + 1):
        ask = _request(experiment, records, server_round)
        for client in honest:
            own = replace(ask, client=client, entries=entries)
            planted.update(own, _site(folder, client), make)
    assert not seen.open
    return seen.total


def _site(folder: Path, client: str) -> Site:
    return Site(partial(Ledger, folder / client), policy=None, simulated=True)


def _request(experiment: Experiment, records: Records, server_round: int) -> UpdateRequest:
    """One round as the mechanism under audit sees it."""
    count = len(records.data)
    groups = records.groups if experiment.privacy.unit_column else None
    units = count if groups is None else len(set(groups))
    return UpdateRequest(
        request=f"audit {server_round}",
        client="0",
        task=TASK,
        phase=LEARN,
        stage=1,
        server_round=server_round,
        data=records.data,
        record_ids=[RecordId(TASK, k) for k in range(count)],
        groups=groups,
        units=lambda: {TASK: units},
        site_units=lambda: units,
    )
