"""Mechanism ``client``: a whole client is hidden, whatever its records are.

With a trusted server (``privacy.trusted_server``) a client trains as without a mechanism and sends
its update alone: the server clips, adds noise and accounts
(:mod:`deal_core.privacy.mechanisms.central_dp`). Adversary: everybody but the server.

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

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.errors import UserError
from deal_core.lora.attach import learning_factors
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.accounting.client_plan import (
    ClientPlan,
    client_event,
    client_plan,
    client_rounds,
)
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.accounting.ledger_event import (
    HONEST_SERVER,
    LedgerEvent,
    composed,
)
from deal_core.privacy.accounting.unit import CLIENT as CLIENT_UNIT
from deal_core.privacy.interface import (
    Counts,
    LocalUpdate,
    Mechanism,
    Permit,
    Refusal,
    Site,
    UpdateRequest,
)
from deal_core.privacy.mechanisms.central_dp import CentralDP
from deal_core.privacy.mechanisms.clipped_mean import clipped, noised
from deal_core.privacy.mechanisms.definition import MechanismDefinition, nobody_trusted
from deal_core.privacy.mechanisms.kept_answer import packed, unpacked
from deal_core.privacy.mechanisms.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.mechanisms.none import NoMechanism, note_unprotected, ordinary_gradients
from deal_core.privacy.mechanisms.one_task_at_a_time import check_one_task_at_a_time
from deal_core.privacy.mechanisms.record import one_factor, refusing_when_spent
from deal_core.privacy.mechanisms.server_side import ServerSide, no_server_noise
from deal_core.privacy.policy import figures_allowed, require_delta, require_floor
from deal_core.randomness import seeded
from deal_core.training.gradients import Probes
from deal_core.training.nonprivate_gradients import NonPrivateGradients
from deal_core.training.objective import Objective

LARGEST_DELTA = 1e-5
"""At a real site, unless its policy says less: how many clients there are, from which an experiment
takes its delta, is the server's word."""
NEIGHBOURS = 2.0
"""Distance of two clipped updates, in units of the bound."""


@dataclass(frozen=True)
class CentralDPClient:
    """Leaves clipping and noise to the server."""

    experiment: Experiment
    unit: str = CLIENT_UNIT

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of :func:`one_factor`."""
        return one_factor(self.experiment, factors)

    def permit(self, ask: UpdateRequest, site: Site) -> Permit:
        """Return leave to train, after which the update goes alone: what else describes the data
        would be in no sum.

        Raises:
            Refusal: there is nothing to learn from, or the site's policy has limits whose keeping
                it could not see.
        """
        policy = site.policy
        if policy is not None and (policy.max_epsilon or policy.max_delta):
            raise Refusal("policy", "the server accounts, so policy.max_epsilon cannot be kept")
        if policy is not None and policy.demanded and not policy.trusted_server:
            raise Refusal("policy", "the site's policy does not trust the server with an update")
        least = max(1, policy.min_records if policy is not None else 1)
        if len(ask.data) < least:
            raise Refusal("no-data", f"fewer than {least} records of task '{ask.task}'")
        return Permit(
            gradients=ordinary_gradients(self.experiment, ask),
            release=lambda update: self._noted(update, ask, site),
        )

    def _noted(self, update: LocalUpdate, ask: UpdateRequest, site: Site) -> LocalUpdate:
        note_unprotected(self.experiment, ask, site, "trusted-server")
        return LocalUpdate(update.arrays, {"num_examples": 1.0})

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """Return the counts, as without a mechanism.

        Raises:
            Refusal: they may not leave.
        """
        return NoMechanism(self.experiment).count(ask, site, make)


@dataclass
class NoisedUpdate:
    """Ordinary gradients; at the end the update is clipped and noised in the model itself, so that
    nothing else can be read from it.

    Attributes:
        inner: orders and computes, each example in a pass of its own, so that memory does not
            depend on how many there are.
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
        """Take ordinary gradients of constant texts, one at a time, as of the client's: what the
        machine has too little memory for fails whatever these are."""
        for probe in range(probes):
            objective.example_losses([probe]).sum().backward()  # type: ignore[no-untyped-call]
        for factor in learning_factors(module).values():
            factor.grad = None

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
    unit: str = CLIENT_UNIT

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of :func:`one_factor`."""
        return one_factor(self.experiment, factors)

    def permit(self, ask: UpdateRequest, site: Site) -> Permit | LocalUpdate:
        """Return leave to train, planned and within the budget, or the update that the same request
        was answered with; an update is clipped, noised and charged before it leaves.

        Raises:
            Refusal: the budget is spent, or earlier releases have hidden less than the client.
        """
        ledger = site.ledger()
        require_floor(len(ask.data), self.experiment.privacy, site.policy)
        with refusing_when_spent():
            plan = self._plan(ask, site)
            budget = plan.budget(site.policy)
            event = self._event(ask, site, plan)
            kept = ledger.answer_within(ask.request, budget)
            if kept is not None:
                return unpacked(kept).with_figures(
                    self._figures(site, plan, event, ledger.events())
                )
            ledger.require(event, budget)
        return Permit(
            gradients=self._gradients(ask, site, plan),
            release=lambda update: self._charged(update, ask, site, plan, event),
            noise_only=self._gradients(replace(ask, data=()), site, plan),
        )

    def _charged(
        self,
        update: LocalUpdate,
        ask: UpdateRequest,
        site: Site,
        plan: ClientPlan,
        event: LedgerEvent,
    ) -> LocalUpdate:
        """The update as it may leave, in the ledger with its charge."""
        events = [*site.ledger().events(), event]
        answer = packed(update.with_figures(self._figures(site, plan, event, events)))
        with refusing_when_spent():
            budget = plan.budget(site.policy)
            return unpacked(site.ledger().charge(event, budget, ask.request, answer))

    def _figures(
        self, site: Site, plan: ClientPlan, event: LedgerEvent, events: Sequence[LedgerEvent]
    ) -> dict[str, float]:
        """What goes with an update; ``events``: of the ledger, with its own."""
        figures = {
            "num_examples": 1.0,  # every client weighs the same
            "simulation_only": float(event.simulation_only),
            "noise_floor": self._scale(plan),
            "epsilon": composed(events, plan.delta),
            "delta": plan.delta,
        }
        return figures_allowed(figures, site.policy)

    def _plan(self, ask: UpdateRequest, site: Site) -> ClientPlan:
        rounds = client_rounds(self.experiment, list(ask.records()))
        largest = 1.0 if site.simulated else LARGEST_DELTA
        limits = site.policy, largest, site.run
        return client_plan(self.experiment, site.ledger(), rounds, 1.0, *limits)

    def _event(self, ask: UpdateRequest, site: Site, plan: ClientPlan) -> LedgerEvent:
        return client_event(
            self.experiment,
            1.0,
            plan.noise_multiplier,
            plan.delta,
            place=(ask.task, ask.phase, ask.stage, ask.server_round),
            simulation_only=self._seeds(site),
            run=site.run,
        )

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """Return the counts, as without a mechanism.

        Raises:
            Refusal: they may not leave.
        """
        return NoMechanism(self.experiment).count(ask, site, make)

    def _seeds(self, site: Site) -> bool:
        return site.simulated and self.experiment.privacy.noise != "secure"

    def _scale(self, plan: ClientPlan) -> float:
        return plan.noise_multiplier * NEIGHBOURS * self.experiment.privacy.max_update_norm

    def _gradients(self, ask: UpdateRequest, site: Site, plan: ClientPlan) -> NoisedUpdate:
        config = self.experiment
        where = ask.client, ask.phase, ask.stage, ask.server_round
        seeds = self._seeds(site)
        noise = SeededNoise(seeded(config.run.seed, "privacy", *where)) if seeds else SecureNoise()
        ordinary = ordinary_gradients(config, ask)
        apart = ordinary.config.model_copy(update={"tokens_per_microbatch": 1})
        inner = replace(ordinary, config=apart)
        return NoisedUpdate(inner, config.privacy.max_update_norm, self._scale(plan), noise)


def make_client(experiment: Experiment) -> Mechanism:
    """Build from the experiment."""
    if experiment.privacy.trusted_server:
        return CentralDPClient(experiment)
    return LocalDPClient(experiment)


def make_client_server(experiment: Experiment, rounds: int, ledger: Ledger) -> ServerSide:
    """Build the server's part: the noise where it is trusted, nothing where it is not."""
    if experiment.privacy.trusted_server:
        return CentralDP(experiment, rounds, ledger)
    return no_server_noise(experiment, rounds, ledger)


def check_clients_protected(experiment: Experiment) -> None:
    """Check that one sum can hold all updates, and that nothing looks at single ones. Whatever a
    client does is inside its update.

    Raises:
        UserError: it cannot, or something does.
    """
    check_one_task_at_a_time(experiment)
    require_delta(experiment.privacy.target_delta, experiment.federation.clients, CLIENT_UNIT)
    if experiment.privacy.unit_column:
        raise UserError(
            'privacy.mechanism = "client" hides whole clients, and privacy.unit_column names '
            'groups of records; leave it empty, or set the mechanism to "record"'
        )
    if not experiment.privacy.trusted_server:
        return
    where = 'privacy.mechanism = "client"'
    if experiment.aggregation.secure:
        raise UserError(
            "aggregation.secure: the server would have to clip every client's update; set "
            "privacy.trusted_server to false, or privacy.mechanism to record"
        )
    if experiment.aggregation.robust != "none":
        raise UserError(
            f"{where} does not go with aggregation.robust '{experiment.aggregation.robust}': the "
            "server may look at no single update; set it to none"
        )
    if experiment.adapter.client_ranks:
        raise UserError(
            f"{where} sums updates of one shape; leave adapter.client_ranks empty, or set "
            "privacy.trusted_server to false"
        )


def trusted_server(privacy: PrivacyConfig) -> str:
    """Return whom an epsilon of the mechanism takes to be honest."""
    return HONEST_SERVER if privacy.trusted_server else nobody_trusted(privacy)


CLIENT = MechanismDefinition(
    client=make_client,
    attacked="clients",
    server=make_client_server,
    check=check_clients_protected,
    assumes=trusted_server,
    noises_updates=True,
)
