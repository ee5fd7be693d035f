"""Mechanism ``client``, at the client: a whole client is hidden, whatever its records are.

With a trusted server (``privacy.trusted_server``) a client trains as without a mechanism and sends
its update alone: the server clips, adds noise and accounts
(:mod:`deal_core.privacy.mechanisms.server_side`). Adversary: everybody but the server.

Without, the client clips its own update and adds noise before it leaves. Neighbours are any two
data sets of the client: its clipped update moves by at most twice the bound, and the noise is in
units of that. Every round that it takes part in is charged to its own ledger, without sampling:
the server knows who answered. Adversary: everybody else, the server included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from deal_core.config.experiment import Experiment
from deal_core.lora.attach import learning_factors
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.accounting.client_plan import UNIT, client_event, client_plan, client_rounds
from deal_core.privacy.accounting.ledger import BudgetSpent, composed
from deal_core.privacy.accounting.plan import NoFeasibleNoise
from deal_core.privacy.interface import Counts, LocalUpdate, Mechanism, Refusal, Site, UpdateRequest
from deal_core.privacy.mechanisms.clipped_mean import clipped, noised
from deal_core.privacy.mechanisms.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.mechanisms.none import NoMechanism, note_unprotected
from deal_core.privacy.mechanisms.record import packed, total, unpacked
from deal_core.randomness import seeded
from deal_core.training.gradients import Gradients, Probes
from deal_core.training.nonprivate_gradients import NonPrivateGradients
from deal_core.training.objective import Objective

LARGEST_DELTA = 1e-5
"""At a real site, unless its policy says less: how many clients there are, from which an experiment
takes its delta, is the server's word."""
NEIGHBOURS = 2.0
"""Distance of two clipped updates, in units of the bound."""


def one_factor(experiment: Experiment, factors: frozenset[str]) -> frozenset[str]:
    """``lora_B`` alone where the rule leaves both, unless told otherwise."""
    both = experiment.privacy.factors == "both" or len(factors) == 1
    return factors if both else factors & {"lora_B"}


@dataclass(frozen=True)
class CentralDPClient:
    """Leaves clipping and noise to the server."""

    experiment: Experiment
    unit: str = UNIT

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of :func:`one_factor`."""
        return one_factor(self.experiment, factors)

    def release(
        self, ask: UpdateRequest, site: Site, make: Callable[[Gradients], LocalUpdate]
    ) -> LocalUpdate:
        """Train, and let go the update alone: what else describes the data would be in no sum.

        Raises:
            Refusal: there is nothing to learn from, or the site's policy has limits whose keeping
                it could not see.
        """
        policy = site.policy
        if policy is not None and (policy.max_epsilon or policy.max_delta):
            raise Refusal("policy", "the server accounts, so policy.max_epsilon cannot be kept")
        if policy is not None and policy.demanded and not policy.trusted_server:
            raise Refusal("policy", "the site's policy does not trust the server with an update")
        if not ask.data:
            raise Refusal("no-data", f"no example of task '{ask.task}'")
        config = self.experiment
        epochs = config.federation.local_epochs
        made = make(NonPrivateGradients(ask.data, epochs, config.train, ask.generator))
        note_unprotected(config, ask, site, "trusted-server")
        return LocalUpdate(made.arrays, {"num_examples": 1.0})

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """As without a mechanism.

        Raises:
            Refusal: they may not leave.
        """
        return NoMechanism(self.experiment).count(ask, site, make)


@dataclass
class NoisedUpdate:
    """Ordinary gradients; at the end the update is clipped and noised in the model itself, so that
    nothing else can be read from it.

    Attributes:
        inner: orders and computes.
        bound: of the update. scale: standard deviation of the noise.
    """

    inner: NonPrivateGradients
    bound: float
    scale: float
    noise: NoiseSource
    _before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def data(self) -> Sequence[Encoded]:
        """All of the client's."""
        return self.inner.data

    def batches(self) -> Iterable[Sequence[int]]:
        """Return the batches of ordinary training."""
        return self.inner.batches()

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """The whole update is clipped, however it was made."""

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """Add the ordinary gradient; return 0, since the loss must stay unknown."""
        if not self._before:
            self._before = _values(module)
        self.inner.accumulate(module, objective, batch)
        return 0.0

    def stepped(self, module: nn.Module) -> None:
        """Do nothing: a step may leave the factors as they are."""

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """Clip, add noise, and put the result in the place of what was learnt."""
        factors = learning_factors(model.module)
        before = self._before or _values(model.module)  # no batch: nothing has moved
        change = {n: f.detach().double().cpu() - before[n] for n, f in factors.items()}
        for name, part in noised(clipped(change, self.bound), self.scale, self.noise).items():
            value = before[name] + part
            with torch.no_grad():
                factors[name].copy_(value.to(factors[name].device, factors[name].dtype))


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: f.detach().double().cpu() for name, f in learning_factors(module).items()}


@dataclass(frozen=True)
class LocalDPClient:
    """Adds the noise itself."""

    experiment: Experiment
    unit: str = UNIT

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of :func:`one_factor`."""
        return one_factor(self.experiment, factors)

    def release(
        self, ask: UpdateRequest, site: Site, make: Callable[[Gradients], LocalUpdate]
    ) -> LocalUpdate:
        """Plan, check the budget, train, clip, add noise, charge, and only then let go.

        Raises:
            Refusal: the budget is spent, or earlier releases have hidden less than the client.
        """
        ledger = site.ledger()
        kept = ledger.answer(ask.request)
        if kept is not None:
            return unpacked(kept)
        if any(event.unit != UNIT for event in ledger.events()):
            raise Refusal("policy", "the ledger holds releases that hide records, not the client")
        seeds = site.simulated and self.experiment.privacy.noise != "secure"
        place = ask.task, ask.phase, ask.stage, ask.server_round
        try:
            rounds = client_rounds(self.experiment, list(ask.records()))
            largest = 1.0 if site.simulated else LARGEST_DELTA
            plan = client_plan(self.experiment, ledger, rounds, 1.0, site.policy, largest)
            event = client_event(
                self.experiment,
                1.0,
                plan.noise_multiplier,
                plan.delta,
                place=place,
                simulation_only=seeds,
            )
            ledger.require(event, plan.budget(site.policy))
            arrays = total(
                make,
                self._gradients(ask, plan.noise_multiplier, seeds),
                self._gradients(replace(ask, data=()), plan.noise_multiplier, seeds),
            )
            figures = {
                "num_examples": 1.0,  # every client weighs the same
                "simulation_only": float(seeds),
                "noise_floor": self._scale(plan.noise_multiplier),
            }
            if site.policy is None or site.policy.spending:
                epsilon = composed([*ledger.events(), event], plan.delta)
                figures |= {"epsilon": epsilon, "delta": plan.delta}
            answer = packed(LocalUpdate(arrays, figures))
            budget = plan.budget(site.policy)
            return unpacked(ledger.charge(event, budget, ask.request, answer))
        except (BudgetSpent, NoFeasibleNoise) as spent:
            reason = str(spent) or "the ledger's past leaves nothing"
            raise Refusal("budget-spent", reason) from None

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """As without a mechanism.

        Raises:
            Refusal: they may not leave.
        """
        return NoMechanism(self.experiment).count(ask, site, make)

    def _scale(self, noise_multiplier: float) -> float:
        return noise_multiplier * NEIGHBOURS * self.experiment.privacy.max_update_norm

    def _gradients(self, ask: UpdateRequest, noise_multiplier: float, seeds: bool) -> NoisedUpdate:
        config = self.experiment
        where = ask.client, ask.phase, ask.stage, ask.server_round
        noise = SeededNoise(seeded(config.run.seed, "privacy", *where)) if seeds else SecureNoise()
        inner = NonPrivateGradients(
            ask.data, config.federation.local_epochs, config.train, ask.generator
        )
        scale = self._scale(noise_multiplier)
        return NoisedUpdate(inner, config.privacy.max_update_norm, scale, noise)


def make_client(experiment: Experiment) -> Mechanism:
    """Build from the experiment."""
    if experiment.privacy.trusted_server:
        return CentralDPClient(experiment)
    return LocalDPClient(experiment)
