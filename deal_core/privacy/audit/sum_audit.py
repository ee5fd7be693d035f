"""The audit of noise in the sum: canaries at one site, and an attacker who sees the sum over sites.

The attacker is the server with as many other sites as the noise is planned against: what these
send it knows, and takes away. Every site plans, opens its ledger, clips, rounds, adds its share and
charges as in a run. The masks are left out: the sum is all that they let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deal_core.config.experiment import Experiment
from deal_core.lora.attach import set_trainable
from deal_core.lora.payload import PREFIX
from deal_core.methods.shared.plain import Plain
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.claim_audit import Repetition
from deal_core.privacy.audit.guesses import guess
from deal_core.privacy.audit.mechanism_audit import (
    MechanismAudit,
    Records,
    audit_request,
    judged,
    with_seed,
)
from deal_core.privacy.audit.planted import FAR, Planted, Scores, Updates, likelihood_ratio
from deal_core.privacy.audit.planted_objective import PlantedObjective
from deal_core.privacy.interface import LocalUpdate, Permit, Site
from deal_core.privacy.mechanisms.noisy_sum import NoisySum, grid_step
from deal_core.privacy.mechanisms.registry import make_mechanism

Total = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SumAudit:
    """What is audited.

    Attributes:
        experiment: clients, rounds, and what is claimed; ``privacy.noise_share`` is ``sum``.
        records: of every site.
        silent: so many of the honest sites, beside the attacked one, leave their noise out; 0
            unless a broken plan is to be noticed.
        canaries: at the attacked site, in each repetition.
    """

    experiment: Experiment
    records: Records
    silent: int = 0
    canaries: int = 1000


def audit_sum(audit: SumAudit, folder: Path, repetitions: int = 4, seed: int = 0) -> MechanismAudit:
    """Play the rounds several times, and judge.

    Args:
        audit: what is audited.
        folder: gets the ledgers; empty.
        repetitions: each with canaries of its own.
        seed: of the canaries.

    Returns:
        How likely such guesses are if the attacked site's ledgers are true, and the bound that
        they give on epsilon.

    Raises:
        Refusal: a site takes no part.
        UserError: more canaries than there is room for.
    """
    done = []
    for k in range(repetitions):
        canaries = GradientCanaries(audit.canaries, seed, k)
        own = with_seed(audit.experiment, audit.experiment.run.seed + k)
        scores = _scores(replace(audit, experiment=own), folder / f"repetition-{k}", canaries)
        spent = tuple(event.spent for event in _ledger(folder / f"repetition-{k}", 0).events())
        done.append(Repetition(spent, guess(scores, canaries.included)))
    return judged(done, _ledger(folder / "repetition-0", 0))


def _ledger(folder: Path, client: int) -> Ledger:
    return Ledger(folder / str(client))


def _scores(audit: SumAudit, folder: Path, canaries: GradientCanaries) -> Scores:
    """Return how the canaries look in all rounds, ``(count,)``: the logarithm of how much likelier
    it is, as planned, that each was there."""
    config = audit.experiment
    seen = np.zeros(canaries.count)
    honest = config.federation.clients - config.privacy.colluding
    for server_round in range(1, config.federation.rounds + 1):
        totals: list[Total] = []
        noise, rate = 0.0, 1.0
        for client in range(honest):
            permit, gradients = _permit(audit, folder, client, server_round, canaries)
            if client == 0:  # as the attacked site plans, whatever the others do
                noise, rate = gradients.noise_multiplier, gradients.sample_rate
            total = _total(audit, client, gradients, canaries)
            permit.release(LocalUpdate(total, {"num_examples": 1.0}))
            totals.append(total)
        along = canaries.scores(_added(totals)) * grid_step(1.0)
        seen += likelihood_ratio(along, rate, noise)
    return seen


def _permit(
    audit: SumAudit, folder: Path, client: int, server_round: int, canaries: GradientCanaries
) -> tuple[Permit, NoisySum]:
    """Leave of a site for a round; the first has the canaries for further records."""
    mechanism = make_mechanism(audit.experiment)
    ask = replace(
        audit_request(audit.experiment, audit.records, server_round),
        client=str(client),
        entries=_entries(audit),
    )
    if client == 0:
        ask = Planted(mechanism, canaries, Updates(canaries, np.zeros(0)), FAR).with_canaries(ask)
    ledger = _ledger(folder, client)
    permit = mechanism.permit(ask, Site(ledger=lambda: ledger, policy=None, simulated=True))
    assert isinstance(permit, Permit)
    assert isinstance(permit.gradients, NoisySum)
    gradients = permit.gradients
    if 0 < client <= audit.silent:
        gradients = replace(gradients, noise_multiplier=0.0)
    return permit, gradients


def _entries(audit: SumAudit) -> int:
    return sum(factor.numel() for factor in _learning(audit))


def _learning(audit: SumAudit) -> list[torch.nn.Parameter]:
    trained = make_mechanism(audit.experiment).trained(frozenset({"lora_A", "lora_B"}))
    return set_trainable(audit.records.model.module, trained)


def _total(audit: SumAudit, client: int, gradients: NoisySum, canaries: GradientCanaries) -> Total:
    records, module = audit.records, audit.records.model.module
    _learning(audit)
    objective: Any = Plain(records.model, records.labels, records.data)
    if client == 0:
        bound = FAR * gradients.max_grad_norm
        objective = PlantedObjective(objective, module, len(records.data), canaries, bound)
    return gradients.total(module, objective)


def _added(totals: Sequence[Total]) -> Mapping[str, torch.Tensor]:
    """The sum over sites, by the names of factors."""
    return {
        key.removeprefix(PREFIX).removesuffix(".weight"): torch.from_numpy(
            np.sum([total[key] for total in totals], axis=0, dtype=np.float64)
        )
        for key in totals[0]
    }
