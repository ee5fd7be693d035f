"""The audit of noise in the sum: canaries at one site, and an attacker who sees the sum over sites.

The attacker is the server with as many other sites as the noise is planned against: what these
send it knows, and takes away. Every site plans, opens its ledger, clips, rounds, adds its share and
charges as in a run. The masks are left out: the sum is all that they let through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.deal.objective import Plain
from deal_core.lora.attach import set_trainable
from deal_core.privacy.audit.audited import Overseen
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
from deal_core.privacy.audit.planted import Scores
from deal_core.privacy.audit.planted_sum import plant_in_sum
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.interface import (
    Gradients,
    GradientSum,
    LocalUpdate,
    Mechanism,
    Permit,
    Site,
    UpdateRequest,
    release,
)
from deal_core.privacy.ledger import Ledger
from deal_core.protection import make_mechanism


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
        spent = tuple(event.spent for event in _ledger(folder / f"repetition-{k}", "0").events())
        done.append(Repetition(spent, guess(scores, canaries.included)))
    return judged(done, _ledger(folder / "repetition-0", "0"))


def _ledger(folder: Path, client: str) -> Ledger:
    return Ledger(folder / client)


def _scores(audit: SumAudit, folder: Path, canaries: GradientCanaries) -> Scores:
    """Return how the canaries look in all rounds, ``(count,)``."""
    config, module = audit.experiment, audit.records.model.module
    honest = tuple(str(k) for k in range(config.federation.clients - config.privacy.colluding))
    mechanism = _muted(make_mechanism(config), honest[1 : 1 + audit.silent])
    planted, seen = plant_in_sum(mechanism, canaries, honest)
    objective: Any = Plain(audit.records.model, audit.records.labels, audit.records.data)
    learning = set_trainable(module, mechanism.trained(frozenset({"lora_A", "lora_B"})))
    entries = sum(factor.numel() for factor in learning)

    def make(given: Gradients | GradientSum) -> LocalUpdate:
        assert isinstance(given, GradientSum)
        return LocalUpdate(given.total(module, objective), {"num_examples": 1.0})

    for server_round in range(1, config.federation.rounds + 1):
        ask = audit_request(config, audit.records, server_round)
        for client in honest:
            site = Site(partial(_ledger, folder, client), policy=None, simulated=True)
            release(planted, replace(ask, client=client, entries=entries), site, make)
    assert not seen.open
    return seen.total


def _muted(inner: Mechanism, silent: tuple[str, ...]) -> Overseen:
    """Return a mechanism that some sites, which are named, have broken: they add no noise."""

    def granted(ask: UpdateRequest, permit: Permit) -> Permit:
        if ask.client not in silent:
            return permit
        assert isinstance(permit.gradients, NoisySum)
        return replace(permit, gradients=replace(permit.gradients, noise_multiplier=0.0))

    return Overseen(inner, granted)
