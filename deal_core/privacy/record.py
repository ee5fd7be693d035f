"""Mechanism ``record``: DP-SGD at the client, so that no record of a site can be told from the
updates that it sends; what is planned, charged and released. A step of it:
:mod:`deal_core.privacy.dpsgd`. And mechanism ``none``: what leaves carries no guarantee, and is
noted.

Unit of privacy: one record (training example) of one site, added or removed; or, with
``privacy.unit_column``, one group: all records of the site with one value of that column.
Adversary: everybody else, the server and the other sites included, in sight of every update. Number
of records (or of groups), rate and number of steps count as public.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from deal_core.config.privacy import PrivacyConfig
from deal_core.errors import UserError
from deal_core.privacy.distributed_noise import (
    NoisySum,
    shares_without_mechanism,
    slack_of,
    trust_in_sum,
    whom_to_trust,
)
from deal_core.privacy.dpsgd import Groups, PrivateGradients, UnsafeModel, require_planned
from deal_core.privacy.events import (
    GROUP,
    RECORD,
    Budget,
    LedgerEvent,
    assumes_more,
    composed,
    is_void,
    unit_of,
    unprotected_event,
)
from deal_core.privacy.interface import (
    FAILED,
    LocalUpdate,
    Site,
    Train,
    TrainingFailed,
    UpdateRequest,
    trained_or_noise,
)
from deal_core.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.plan import (
    MOST_ENTRIES,
    NoFeasibleNoise,
    PrivacyPlan,
    RunSchedule,
    solve_noise_multiplier,
)
from deal_core.privacy.policy import OutsidePlan, in_sum, terms
from deal_core.randomness import seeded
from deal_core.wire.instruction import LEARN


@dataclass(frozen=True)
class RecordMechanism:
    """Mechanism ``record`` of one run."""

    privacy: PrivacyConfig
    run: str
    """Its name in a ledger, unless the site has another for it."""
    seed: int
    """Of a simulated client's noise."""
    batch_size: int
    """Records, or groups, that a step is divided by."""
    at_server: bool
    """Whether a round is one sum, for a step at the server."""
    shares: int
    """Of so many sites the noise of a sum makes up the whole."""
    schedule: Callable[[Mapping[str, int]], RunSchedule]
    """What the run asks of a site with so many records, or groups, of each task."""

    @property
    def unit(self) -> str:
        """Return ``record``, or ``group`` where ``privacy.unit_column`` makes some."""
        return unit_of(self.privacy)

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return ``lora_B`` alone where the rule leaves both: the product of two noisy factors is
        noisier than either."""
        return factors & {"lora_B"} if len(factors) > 1 else factors

    def update(self, ask: UpdateRequest, site: Site, train: Train) -> LocalUpdate:
        """Return the update, planned, within the budget and charged before it may leave; or the one
        that the same request was answered with. Figures are those of today.

        Raises:
            BudgetSpent: the ledger has no room left; after training only where another process
                has used it meanwhile.
            OutsidePlan: what is asked is not what the run has planned, or goes with no plan.
            TrainingFailed: on noise alone as well.
        """
        ledger = site.ledger()
        try:
            plan = self._plan(ask, site)
            work = plan.of(ask.task)
            budget = plan.budget(site.policy, work.rounds + work.sums)
            if budget.disjoint_tasks:
                ledger.declare_members(ask.task, ask.ids(), self.unit)
            event = replace(self._event(ask, site, plan), compared=budget.disjoint_tasks)
            require_planned(ask, self._groups(ask), work.records)
            kept = ledger.answer_within(ask.request, budget)
            if kept is None:
                ledger.require(event, budget)
        except (UserError, UnsafeModel) as error:
            raise OutsidePlan(str(error)) from None
        if kept is None:
            made = trained_or_noise(train, lambda data: self._gradients(ask, event, data))
            kept = self._charged(made, ask, site, event, budget)
        arrays = load(kept)
        if FAILED in arrays:
            raise TrainingFailed("a private training has failed, and so has one on noise alone")
        return LocalUpdate(arrays, self._figures(site, plan, event, budget))

    def _charged(
        self, made: LocalUpdate, ask: UpdateRequest, site: Site, event: LedgerEvent, budget: Budget
    ) -> bytes:
        """The answer that may leave, as bytes, in the ledger with its charge."""
        answer = save({key: np.ascontiguousarray(value) for key, value in made.arrays.items()})
        return site.ledger().charge(event, budget, ask.request, answer)

    def _figures(
        self, site: Site, plan: PrivacyPlan, event: LedgerEvent, budget: Budget
    ) -> dict[str, float]:
        """Return what goes with an update: of rates, noise and steps, not of data."""
        events = site.ledger().events()
        flags = {
            "disjoint_tasks": budget.disjoint_tasks,
            "void": is_void(events),
            "assumes_more": assumes_more(events, whom_to_trust(self.privacy), self._run(site)),
        }
        return {
            "num_examples": 1.0,  # every client weighs the same: a count is a release
            "simulation_only": float(event.simulation_only),
            "epsilon": composed(events, plan.delta, budget.disjoint_tasks),
            "delta": plan.delta,
            "n_delta": plan.units * plan.delta,
            **{name: 1.0 for name, holds in flags.items() if holds},
        }

    def _plan(self, ask: UpdateRequest, site: Site) -> PrivacyPlan:
        """The run's plan as the ledger has it; made with the first round."""

        def solve(past: Sequence[LedgerEvent]) -> str:
            plan = self._solve(past, ask.units(), ask.site_units(), site, ask.entries)
            return plan.model_dump_json()

        return PrivacyPlan.model_validate_json(site.ledger().plan(self._run(site), solve))

    def _solve(
        self,
        past: Sequence[LedgerEvent],
        units: Mapping[str, int],
        site_units: int,
        site: Site,
        entries: int = 0,
    ) -> PrivacyPlan:
        epsilon, delta = terms(self.privacy, site.policy, site_units)
        asked = site.simulated and self.privacy.disjoint_tasks
        disjoint = asked or (site.policy is not None and site.policy.disjoint_tasks)
        run = self.schedule(units)

        def epsilon_with(noise_multiplier: float) -> float:
            planned = self._planned(site, run, noise_multiplier, entries)
            return composed([*past, *planned], delta, disjoint)

        if not run.common_noise:
            noise_multiplier = solve_noise_multiplier(epsilon_with, epsilon)
        else:  # that of all sites, who make the noise together
            noise_multiplier, spent = run.common_noise, epsilon_with(run.common_noise)
            if spent > epsilon:
                raise NoFeasibleNoise(
                    f"noise of {noise_multiplier:.2f} clipping bounds, that of all sites, takes "
                    f"epsilon to {spent:.4g} here at delta = {delta:.3g} per {self.unit}, composed "
                    f"over all that the ledger holds, and {epsilon:g} are left; raise the budget, "
                    "or plan the run with a smaller privacy.target_epsilon or target_delta"
                )
        return PrivacyPlan(
            noise_multiplier=noise_multiplier,
            epsilon=epsilon,
            delta=delta,
            disjoint_tasks=disjoint,
            max_grad_norm=self.privacy.max_grad_norm,
            work=run.work,
            units=site_units,
        )

    def _released(
        self, site: Site, task: str, steps: tuple[float, float, int], **fields: Any
    ) -> LedgerEvent:
        """Return what the ledger is charged with for steps: their rate, noise and number."""
        rate, noise_multiplier, number = steps
        return LedgerEvent(
            run=self._run(site),
            task=task,
            mechanism=RECORD,
            unit=self.unit,
            unit_column=self.privacy.unit_column,
            sample_rate=rate,
            noise_multiplier=noise_multiplier,
            steps=number,
            **fields,
        )

    def _planned(
        self, site: Site, run: RunSchedule, noise: float, entries: int
    ) -> list[LedgerEvent]:
        """Return all that a run takes at most, with this noise in its steps: of each task, all
        rounds as one event, compared before each charge where tasks compose in parallel."""
        planned = list[LedgerEvent]()
        slack = slack_of(noise, self.shares, entries) if self.at_server and entries else 0.0
        of_sums = slack_of(run.sums_noise, self.shares, MOST_ENTRIES) if run.sums_noise else 0.0
        for work in run.work:
            steps = work.sample_rate, noise, work.rounds * work.steps
            planned.append(self._released(site, work.task, steps, slack=slack, compared=True))
            if work.sums:
                sums = 1.0, run.sums_noise, work.sums
                planned.append(self._released(site, work.task, sums, slack=of_sums, compared=True))
        return planned

    def _event(self, ask: UpdateRequest, site: Site, plan: PrivacyPlan) -> LedgerEvent:
        """Return the charge of a round: of steps, or of class sums beside them."""
        work, summed = plan.of(ask.task), self.at_server
        steps = work.sample_rate, plan.noise_multiplier, work.steps
        if ask.sums_noise is not None and ask.phase != LEARN:
            units = {work.task: work.records for work in plan.work}
            steps, summed = (1.0, self.schedule(units).sums_noise, 1), True
        return self._released(
            site,
            ask.task,
            steps,
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            simulation_only=site.simulated and self.privacy.noise != "secure",
            max_grad_norm=plan.max_grad_norm,
            delta=plan.delta,
            slack=slack_of(steps[1], self.shares, ask.entries) if summed else 0.0,
            assumes=trust_in_sum(self.privacy, site.policy) if in_sum(self.privacy) else "",
        )

    def _groups(self, ask: UpdateRequest) -> Sequence[int]:
        if self.unit != GROUP:
            return range(len(ask.data))
        if ask.groups is None:
            raise UserError(
                "groups of records are protected, but nothing says which record is whose"
            )
        return ask.groups

    def _gradients(
        self, ask: UpdateRequest, event: LedgerEvent, data: bool = True
    ) -> PrivateGradients | NoisySum:
        """Return what the event is charged for, over the records; or without ``data`` the same on
        none: noise alone."""
        groups = Groups(self._groups(ask))
        noise: NoiseSource = SecureNoise()
        if event.simulation_only:
            where = ask.client, ask.phase, ask.stage, ask.server_round
            noise = SeededNoise(seeded(self.seed, "privacy", *where))
        hidden: dict[str, Any] = {
            "data": ask.data if data else (),
            "record_ids": ask.record_ids if data else (),
            "groups": groups if data else Groups(()),
            "sample_rate": event.sample_rate,
            "noise_multiplier": event.noise_multiplier,
            "max_grad_norm": event.max_grad_norm,
            "noise": noise,
        }
        if self.at_server or ask.sums_noise is not None:
            return NoisySum(**hidden, shares=self.shares)
        expected = self.batch_size
        if self.privacy.sample_rate:
            expected = max(1, round(self.privacy.sample_rate * len(groups)))
        return PrivateGradients(**hidden, steps=event.steps, expected_batch=expected)

    def _run(self, site: Site) -> str:
        return site.run or self.run


@dataclass(frozen=True)
class NoMechanism:
    """Mechanism ``none`` of one run: ordinary gradients, or sums."""

    privacy: PrivacyConfig
    run: str
    """Its name in a ledger."""
    seed: int
    """Of a simulated client's noise."""
    at_server: bool
    """Whether a round is one sum, for a step at the server."""
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of the rule."""
        return factors

    def update(self, ask: UpdateRequest, site: Site, train: Train) -> LocalUpdate:
        """Return what was trained; a real site notes it in its ledger: of its records no epsilon
        holds."""
        update = train(self._sum(ask, site))
        for task in () if site.simulated else ask.joint_tasks or (ask.task,):
            place = task, ask.phase, ask.stage, ask.server_round
            site.ledger().note(unprotected_event(site.run or self.run, "none", place))
        return update

    def _sum(self, ask: UpdateRequest, site: Site) -> NoisySum | None:
        """Return None for ordinary gradients; class sums over all records, with the site's share of
        the noise; or, for a step at the server, the sum of clipped gradients without noise: of all
        records at a real site, since the run's seed, the server's word, would choose a sample."""
        if ask.sums_noise is None and not self.at_server:
            return None
        place = ask.client, ask.stage, ask.server_round
        rate, shares = 1.0, 1
        noise: NoiseSource = SecureNoise()
        if ask.sums_noise is not None:
            shares = shares_without_mechanism(ask.sites, self.privacy.colluding)
            if site.simulated:
                noise = SeededNoise(seeded(self.seed, "sums", *place))
        else:
            noise = SeededNoise(seeded(self.seed, "train", *place))  # of nothing but the draw
            if site.simulated:
                rate = self.privacy.sample_rate or 1.0
        return NoisySum(
            data=ask.data,
            record_ids=ask.record_ids,
            sample_rate=rate,
            noise_multiplier=ask.sums_noise or 0.0,
            max_grad_norm=self.privacy.max_grad_norm,
            shares=shares,
            noise=noise,
        )
