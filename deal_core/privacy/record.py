"""Mechanism ``record``: DP-SGD at the client, so that no record of a site can be told from the
updates that it sends; what is planned, charged and released. A step of it:
:mod:`deal_core.privacy.dpsgd`.

Unit of privacy: one record (training example) of one site, added or removed; or, with
``privacy.unit_column``, one group: all records of the site with one value of that column.
Adversary: everybody else, the server and the other sites included, in sight of every update. Number
of records (or of groups), rate and number of steps count as public.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.numpy import load, save

from deal_core.config.privacy import PrivacyConfig
from deal_core.errors import UserError
from deal_core.privacy.distributed_noise import NoisySum, whom_to_trust
from deal_core.privacy.dpsgd import Groups, PrivateGradients
from deal_core.privacy.events import (
    COUNTS,
    RECORD,
    Budget,
    BudgetSpent,
    LedgerEvent,
    MixedUnits,
    assumes_more,
    composed,
    is_void,
    unit_of,
)
from deal_core.privacy.guards import UnsafeModel, require_planned
from deal_core.privacy.interface import (
    Counts,
    Grouping,
    LocalUpdate,
    Permit,
    Refusal,
    RehearsalFailed,
    Site,
    UpdateRequest,
)
from deal_core.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.plan import (
    NoFeasibleNoise,
    PrivacyPlan,
    RecordEvents,
    RunSchedule,
    sensitivity,
    solve_noise_multiplier,
)
from deal_core.privacy.policy import (
    EffectivePolicy,
    Metrics,
    figures_allowed,
    metrics_allowed,
    protects,
    require_bound,
    require_floor,
    terms,
)
from deal_core.privacy.unprotected import clear_counts
from deal_core.randomness import seeded
from deal_core.wire.records import EXAMPLES

log = logging.getLogger(__name__)


@contextmanager
def refusing_when_spent() -> Iterator[None]:
    """Refuse where the ledger has no room left, or holds releases of another unit."""
    try:
        yield
    except (BudgetSpent, NoFeasibleNoise) as spent:
        reason = str(spent) or "the ledger's past leaves nothing"
        raise Refusal("budget-spent", reason) from None
    except MixedUnits as mixed:
        raise Refusal("policy", str(mixed)) from None


@dataclass(frozen=True)
class RecordMechanism:
    """The mechanism of one run.

    Attributes:
        privacy: its settings.
        run: its name in a ledger, unless the site has another for it.
        seed: of a simulated client's noise.
        batch_size: records, or groups, that a step is divided by.
        at_server: whether a round is one sum, for a step at the server.
        shares: of so many sites the noise of a sum makes up the whole.
        schedule: what the run asks of a site with so many records, or groups, of each task.
    """

    privacy: PrivacyConfig
    run: str
    seed: int
    batch_size: int
    at_server: bool
    shares: int
    schedule: Callable[[Mapping[str, int]], RunSchedule]

    @property
    def unit(self) -> str:
        """Return ``record``, or ``group`` where ``privacy.unit_column`` makes some."""
        return unit_of(self.privacy)

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return ``lora_B`` alone where the rule leaves both: the product of two noisy factors is
        noisier than either."""
        return factors & {"lora_B"} if len(factors) > 1 else factors

    def permit(self, ask: UpdateRequest, site: Site) -> Permit | LocalUpdate:
        """Return leave to train, planned and within the budget, or the update that the same request
        was answered with; an update is charged before it may leave.

        Raises:
            Refusal: the site's policy does not allow it, or its budget is spent.
        """
        ledger = site.ledger()
        require_floor(len(ask.data), self.privacy, site.policy)
        try:
            with refusing_when_spent():
                plan = self._plan(ask, site)
                require_bound(plan.max_grad_norm, site.policy)
                budget = self._budget(plan, ask, site)
                if budget.disjoint_tasks:
                    ledger.declare_members(ask.task, ask.ids(), self.unit)
                event = self._event(ask, site, plan)
                event = replace(event, compared=budget.disjoint_tasks)
                planned, groups = plan.records(ask.task), self._groups(ask)
                require_planned(ask.record_ids, len(ask.data), ask.task, planned, groups)
                kept = ledger.answer_within(ask.request, budget)
                if kept is not None:
                    figures = self._figures(ask, site, plan, event, ledger.events())
                    return unpacked(kept).with_figures(figures)
                ledger.require(event, budget)
        except (UserError, UnsafeModel) as error:
            raise Refusal("policy", str(error)) from None
        return Permit(
            gradients=self._gradients(ask, site, event),
            release=lambda update: self._charged(update, ask, site, plan, event),
            noise_only=self._noise_only(ask, site, event),
        )

    def _event(self, ask: UpdateRequest, site: Site, plan: PrivacyPlan) -> LedgerEvent:
        """Return what the ledger is charged with."""
        units = {work.task: work.records for work in plan.work}
        seeds, sums_noise = self._seeds(site), self.schedule(units).sums_noise
        return self._events(site).update(ask, seeds, plan, site.policy, sums_noise)

    def _charged(
        self,
        update: LocalUpdate,
        ask: UpdateRequest,
        site: Site,
        plan: PrivacyPlan,
        event: LedgerEvent,
    ) -> LocalUpdate:
        """The update as it may leave, in the ledger with its charge."""
        budget = self._budget(plan, ask, site)
        with refusing_when_spent():
            events = [*site.ledger().events(), event]
            answer = packed(update.with_figures(self._figures(ask, site, plan, event, events)))
            return unpacked(site.ledger().charge(event, budget, ask.request, answer))

    def _budget(self, plan: PrivacyPlan, ask: UpdateRequest, site: Site) -> Budget:
        """What the charge of an update is checked against."""
        return replace(plan.budget(site.policy), most=plan.rounds(ask.task))

    def _figures(
        self,
        ask: UpdateRequest,
        site: Site,
        plan: PrivacyPlan,
        event: LedgerEvent,
        events: Sequence[LedgerEvent],
    ) -> dict[str, float]:
        """What goes with an update: of rates, noise and steps, not of data; ``events``: all."""
        disjoint = plan.budget(site.policy).disjoint_tasks
        to_come = self._counts_to_come(ask, site, plan)
        figures = {
            "num_examples": 1.0,  # every client weighs the same: a count is a release
            "simulation_only": float(event.simulation_only),
            "epsilon": composed([*events, *to_come], plan.delta, disjoint),
            "delta": plan.delta,
            "n_delta": plan.units * plan.delta,
        }
        trust = whom_to_trust(self.privacy)
        flags = {
            "disjoint_tasks": disjoint,
            "void": is_void(events),
            "assumes_more": assumes_more(events, trust, self._run(site)),
        }
        figures |= {name: 1.0 for name, holds in flags.items() if holds}
        return figures_allowed(figures, site.policy)

    def _counts_to_come(
        self, ask: UpdateRequest, site: Site, plan: PrivacyPlan
    ) -> list[LedgerEvent]:
        """Return the noised counts that the run still plans, those left out that the ledger holds:
        an evaluation tells no epsilon, so an update tells it with them."""
        if not self._counts_are_noised(site):
            return []
        run, events = self._run(site), site.ledger().events()
        given = sum(event.mechanism == COUNTS and event.run == run for event in events)
        left = self.schedule(self._counts(ask)[0]).evaluations - given
        return [self._events(site).planned_counts(left, plan.delta)] if left > 0 else []

    def _counts_are_noised(self, site: Site) -> bool:
        return self._allowed(site) == "noised"

    def _allowed(self, site: Site, masked: bool = False) -> Metrics:
        """Return what the site lets counts do; where it wants noise in them, and the mechanism is
        one in name alone, they stay."""
        privacy, policy = self.privacy, site.policy
        allowed = metrics_allowed(privacy.metrics, policy, masked)
        wanted = policy is not None and policy.metrics == "noised"
        return "none" if wanted and not protects(privacy, policy) else allowed

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """Return the counts in the clear, or with noise that is charged like an update.

        Raises:
            Refusal: they may not leave, or the budget is spent.
            RehearsalFailed: they cannot be made of a constant text already; nothing is charged.
        """
        allowed = self._allowed(site, ask.masked)
        if allowed == "none":
            raise Refusal("withheld", "counts of right answers do not leave this site")
        if allowed == "clear":
            return clear_counts(self._run(site), ask, site, make)
        ledger = site.ledger()
        try:
            plan = self._plan(ask, site)
            most = self.schedule(self._counts(ask)[0]).evaluations
            budget = replace(plan.budget(site.policy), most=most)
            kept = ledger.answer_within(ask.request, budget)
            if kept is None:
                event = self._events(site).counting(ask, self._seeds(site), plan)
                ledger.require(event, budget)
                answer = self._noised_counts(ask, event, make)
                kept = ledger.charge(event, budget, ask.request, answer)
        except (BudgetSpent, NoFeasibleNoise, UserError) as reason:
            raise Refusal("withheld", str(reason)) from None
        counts: Counts = json.loads(kept)
        return counts

    def _noised_counts(
        self, ask: UpdateRequest, event: LedgerEvent, make: Callable[[], Counts]
    ) -> bytes:
        """Return the answer that is charged, noised counts as JSON; where counting fails, counts of
        nothing: that it does tells of data.

        Raises:
            RehearsalFailed: it fails on a constant text already.
        """
        noise = self._noise(ask) if event.simulation_only else SecureNoise()
        try:
            counts = make()
        except RehearsalFailed:  # no record was read
            raise
        except Exception:
            log.exception("counts could not be made; noise alone leaves")
            counts = dict.fromkeys(ask.counted, [0] * ask.evaluated)
        return json.dumps(dict(noised_counts(counts, event.noise_multiplier, noise))).encode()

    def _plan(self, ask: UpdateRequest, site: Site) -> PrivacyPlan:
        """The run's plan as the ledger has it; made with the first round."""

        def solve(past: Sequence[LedgerEvent]) -> str:
            return self._solve(past, *self._counts(ask), site, ask.entries).model_dump_json()

        return PrivacyPlan.model_validate_json(site.ledger().plan(self._run(site), solve))

    def _counts(self, ask: UpdateRequest) -> tuple[Mapping[str, int], int]:
        """Return how many units there are: of every task of the run, and of the whole site.

        Raises:
            UserError: groups are protected, but the records have none.
        """
        if self.unit == RECORD:
            return ask.records(), ask.site_records()
        return _required(ask).groups(), _required(ask).site_groups()

    def _groups(self, ask: UpdateRequest) -> Sequence[int] | None:
        """Return the group of every record that is asked about; None: each by itself."""
        return None if self.unit == RECORD else _required(ask).numbers

    def _solve(
        self,
        past: Sequence[LedgerEvent],
        records: Mapping[str, int],
        site_records: int,
        site: Site,
        entries: int = 0,
    ) -> PrivacyPlan:
        agreed = terms(self.privacy, site.policy, site_records)
        asked = site.simulated and self.privacy.disjoint_tasks
        disjoint = agreed.disjoint_tasks or asked
        run, events = self.schedule(records), self._events(site)
        counts = run.evaluations if self._counts_are_noised(site) else 0

        def epsilon_with(noise_multiplier: float) -> float:
            planned = [
                events.planned(each, noise_multiplier, agreed.delta, agreed.max_grad_norm, entries)
                for each in run.work
            ]
            sums = [each for each in run.work if each.sums]
            planned += [events.planned_sums(each, run.sums_noise, agreed.delta) for each in sums]
            planned += [events.planned_counts(counts, agreed.delta)] if counts else []
            return composed([*past, *planned], agreed.delta, disjoint)

        return PrivacyPlan(
            noise_multiplier=self._multiplier(epsilon_with, agreed, run.common_noise),
            epsilon=agreed.epsilon,
            delta=agreed.delta,
            disjoint_tasks=disjoint,
            max_grad_norm=agreed.max_grad_norm,
            work=run.work,
            units=site_records,
        )

    def _multiplier(
        self, epsilon_with: Callable[[float], float], agreed: EffectivePolicy, common: float
    ) -> float:
        """That of all sites, where they make the noise together; else the smallest that fits."""
        epsilon, delta = agreed.epsilon, agreed.delta
        if not common:
            return solve_noise_multiplier(epsilon_with, epsilon)
        if epsilon_with(common) > epsilon:
            raise NoFeasibleNoise(
                f"noise of {common:.2f} clipping bounds, that of all sites, takes epsilon to "
                f"{epsilon_with(common):.4g} here at delta = {delta:.3g} per {self.unit}, composed "
                f"over all that the ledger holds, and {epsilon:g} are left; raise the budget, or "
                "plan the run with a smaller privacy.target_epsilon or target_delta"
            )
        return common

    def _gradients(
        self, ask: UpdateRequest, site: Site, event: LedgerEvent
    ) -> PrivateGradients | NoisySum:
        numbers = self._groups(ask)
        groups = None if numbers is None else Groups(numbers)
        noise: NoiseSource = self._noise(ask) if event.simulation_only else SecureNoise()
        if self.at_server or ask.statistics is not None:
            return NoisySum(
                data=ask.data,
                record_ids=ask.record_ids,
                sample_rate=event.sample_rate,
                noise_multiplier=event.noise_multiplier,
                max_grad_norm=event.max_grad_norm,
                shares=self.shares,
                noise=noise,
                groups=groups,
            )
        expected = self.batch_size
        if self.privacy.sample_rate:
            units = len(ask.data) if groups is None else len(groups)
            expected = max(1, round(self.privacy.sample_rate * units))
        return PrivateGradients(
            data=ask.data,
            record_ids=ask.record_ids,
            sample_rate=event.sample_rate,
            noise_multiplier=event.noise_multiplier,
            max_grad_norm=event.max_grad_norm,
            steps=event.steps,
            expected_batch=expected,
            noise=noise,
            groups=groups,
        )

    def _noise_only(
        self, ask: UpdateRequest, site: Site, event: LedgerEvent
    ) -> PrivateGradients | NoisySum:
        """The same on no record: noise alone."""
        return replace(self._gradients(ask, site, event), data=(), record_ids=(), groups=None)

    def _seeds(self, site: Site) -> bool:
        return site.simulated and self.privacy.noise != "secure"

    def _noise(self, ask: UpdateRequest) -> SeededNoise:
        where = ask.client, ask.phase, ask.stage, ask.server_round
        return SeededNoise(seeded(self.seed, "privacy", *where))

    def _events(self, site: Site) -> RecordEvents:
        return RecordEvents(self.privacy, self.unit, self._run(site), self.shares, self.at_server)

    def _run(self, site: Site) -> str:
        return site.run or self.run


def _required(ask: UpdateRequest) -> Grouping:
    """Return the groups of a request's records.

    Raises:
        UserError: there are none.
    """
    if ask.grouping is None:
        raise UserError("groups of records are protected, but nothing says which record is whose")
    return ask.grouping


def packed(made: LocalUpdate) -> bytes:
    """Return an update as bytes that a ledger keeps."""
    arrays = {key: np.ascontiguousarray(value) for key, value in made.arrays.items()}
    return save(arrays, {"figures": json.dumps(dict(made.figures))})


def unpacked(answer: bytes) -> LocalUpdate:
    """Undo :func:`packed`."""
    length = int.from_bytes(answer[:8], "little")
    header = json.loads(answer[8 : 8 + length])
    return LocalUpdate(load(answer), json.loads(header["__metadata__"]["figures"]))


def noised_counts(counts: Counts, noise_multiplier: float, noise: NoiseSource) -> Counts:
    """Return whole numbers, none of right answers above that of examples, and at least one example
    a task, so that it does not show which tasks a site has.

    Args:
        counts: right answers and examples, an entry a task.
        noise_multiplier: standard deviation of the noise in units of :func:`sensitivity`.
        noise: where it comes from.
    """
    scale = noise_multiplier * sensitivity(len(counts[EXAMPLES]), len(counts))
    loud = {
        name: torch.tensor(counts[name], dtype=torch.float64)
        + scale * noise.normal(torch.Size([len(counts[name])]))
        for name in counts
    }
    examples = [max(1, round(n)) for n in loud.pop(EXAMPLES).tolist()]
    right = {
        name: [min(max(0, round(c)), n) for c, n in zip(values.tolist(), examples, strict=True)]
        for name, values in loud.items()
    }
    return {**right, EXAMPLES: examples}
