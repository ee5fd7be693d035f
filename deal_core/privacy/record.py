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
from functools import cached_property

import numpy as np
from safetensors.numpy import load, save

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import run_name
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.privacy.counts import clear_counts, noised_counts, sensitivity
from deal_core.privacy.distributed_noise import (
    NoisySum,
    shares_of,
    slack_of,
    trust_in_sum,
    whom_to_trust,
)
from deal_core.privacy.dpsgd import Groups, PrivateGradients
from deal_core.privacy.events import (
    COUNTS,
    Budget,
    BudgetSpent,
    LedgerEvent,
    MixedUnits,
    assumes_more,
    composed,
    is_void,
    unit_of,
)
from deal_core.privacy.events import RECORD as RECORD_UNIT
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
    METRICS_NOISE,
    NoFeasibleNoise,
    PrivacyPlan,
    ReleaseSchedule,
    common_noise_multiplier,
    evaluations,
    planned_work,
    solve_noise_multiplier,
    sums_noise_multiplier,
)
from deal_core.privacy.policy import (
    EffectivePolicy,
    Metrics,
    Policy,
    at_server,
    figures_allowed,
    in_sum,
    metrics_allowed,
    protects,
    require_bound,
    require_floor,
    require_shares,
    terms,
)
from deal_core.randomness import seeded
from deal_core.wire.instruction import LEARN

log = logging.getLogger(__name__)


def one_factor(experiment: Experiment, factors: frozenset[str]) -> frozenset[str]:
    """``lora_B`` alone where the rule leaves both, unless told otherwise."""
    both = experiment.privacy.factors == "both" or len(factors) == 1
    return factors if both else factors & {"lora_B"}


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
    """Attributes: the ``experiment``."""

    experiment: Experiment

    @property
    def unit(self) -> str:
        """Return ``record``, or ``group`` where ``privacy.unit_column`` makes some."""
        return unit_of(self.experiment.privacy)

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of :func:`one_factor`."""
        return one_factor(self.experiment, factors)

    def permit(self, ask: UpdateRequest, site: Site) -> Permit | LocalUpdate:
        """Return leave to train, planned and within the budget, or the update that the same request
        was answered with; an update is charged before it may leave.

        Raises:
            Refusal: the site's policy does not allow it, or its budget is spent.
        """
        ledger = site.ledger()
        require_floor(len(ask.data), self.experiment.privacy, site.policy)
        try:
            with refusing_when_spent():
                require_shares(self.experiment.privacy, site.policy)
                plan = self._plan(ask, site)
                require_bound(plan.max_grad_norm, site.policy)
                budget = self._budget(plan, ask, site)
                if budget.disjoint_tasks:
                    ledger.declare_members(ask.task, ask.ids(), self.unit)
                event = self._events(site).update(ask, self._seeds(site), plan, site.policy)
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
        trust = whom_to_trust(self.experiment.privacy)
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
        left = evaluations(self.experiment, len(self._counts(ask)[0])) - given
        return [self._events(site).planned_counts(left, plan.delta)] if left > 0 else []

    def _counts_are_noised(self, site: Site) -> bool:
        return self._allowed(site) == "noised"

    def _allowed(self, site: Site, masked: bool = False) -> Metrics:
        """Return what the site lets counts do; where it wants noise in them, and the mechanism is
        one in name alone, they stay."""
        privacy, policy = self.experiment.privacy, site.policy
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
            return clear_counts(self.experiment, ask, site, make)
        ledger = site.ledger()
        try:
            plan = self._plan(ask, site)
            most = evaluations(self.experiment, len(self._counts(ask)[0]))
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
        if self.unit == RECORD_UNIT:
            return ask.records(), ask.site_records()
        return _required(ask).groups(), _required(ask).site_groups()

    def _groups(self, ask: UpdateRequest) -> Sequence[int] | None:
        """Return the group of every record that is asked about; None: each by itself."""
        return None if self.unit == RECORD_UNIT else _required(ask).numbers

    def _solve(
        self,
        past: Sequence[LedgerEvent],
        records: Mapping[str, int],
        site_records: int,
        site: Site,
        entries: int = 0,
    ) -> PrivacyPlan:
        config = self.experiment
        agreed = terms(config.privacy, site.policy, site_records)
        asked = site.simulated and config.privacy.disjoint_tasks
        disjoint = agreed.disjoint_tasks or asked
        phases = method_of(config).phases
        work = planned_work(config, phases, records)
        counts = evaluations(config, len(records)) if self._counts_are_noised(site) else 0
        events = self._events(site)

        def epsilon_with(noise_multiplier: float) -> float:
            planned = [
                events.planned(each, noise_multiplier, agreed.delta, agreed.max_grad_norm, entries)
                for each in work
            ]
            sums = [each for each in work if each.sums]
            planned += [events.planned_sums(each, len(work), agreed.delta) for each in sums]
            planned += [events.planned_counts(counts, agreed.delta)] if counts else []
            return composed([*past, *planned], agreed.delta, disjoint)

        return PrivacyPlan(
            noise_multiplier=self._multiplier(epsilon_with, agreed, len(records)),
            epsilon=agreed.epsilon,
            delta=agreed.delta,
            disjoint_tasks=disjoint,
            max_grad_norm=agreed.max_grad_norm,
            work=tuple(work),
            units=site_records,
        )

    def _multiplier(
        self, epsilon_with: Callable[[float], float], agreed: EffectivePolicy, tasks: int
    ) -> float:
        """That of all sites, where they make the noise together; else the smallest that fits."""
        epsilon, delta = agreed.epsilon, agreed.delta
        if not at_server(self.experiment):
            return solve_noise_multiplier(epsilon_with, epsilon)
        common = common_noise_multiplier(self.experiment, tasks)
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
        noise = self._noise(ask) if event.simulation_only else SecureNoise()
        numbers = self._groups(ask)
        groups = None if numbers is None else Groups(numbers)
        make = GRADIENTS[self.experiment.train.step] if ask.statistics is None else sum_gradients
        return make(self.experiment, ask, event, noise, groups)

    def _noise_only(
        self, ask: UpdateRequest, site: Site, event: LedgerEvent
    ) -> PrivateGradients | NoisySum:
        """The same on no record: noise alone."""
        return replace(self._gradients(ask, site, event), data=(), record_ids=(), groups=None)

    def _seeds(self, site: Site) -> bool:
        return site.simulated and self.experiment.privacy.noise != "secure"

    def _noise(self, ask: UpdateRequest) -> SeededNoise:
        where = ask.client, ask.phase, ask.stage, ask.server_round
        return SeededNoise(seeded(self.experiment.run.seed, "privacy", *where))

    def _events(self, site: Site) -> RecordEvents:
        return RecordEvents(self.experiment, self.unit, self._run(site))

    def _run(self, site: Site) -> str:
        return site.run or self._settings

    @cached_property
    def _settings(self) -> str:
        return run_name(self.experiment)


def _required(ask: UpdateRequest) -> Grouping:
    """Return the groups of a request's records.

    Raises:
        UserError: there are none.
    """
    if ask.grouping is None:
        raise UserError("groups of records are protected, but nothing says which record is whose")
    return ask.grouping


MOST_ENTRIES = 1_000_000
"""Of the class sums of a task, where a plan is made: what it costs that noise is discrete."""


@dataclass(frozen=True)
class RecordEvents:
    """Attributes: the ``experiment``; ``unit`` of privacy; ``run``, its name in a ledger."""

    experiment: Experiment
    unit: str
    run: str

    def planned(
        self,
        work: ReleaseSchedule,
        noise_multiplier: float,
        delta: float,
        bound: float,
        entries: int = 0,
    ) -> LedgerEvent:
        """Return all rounds of a task as one event."""
        return LedgerEvent(
            run=self.run,
            task=work.task,
            phase="",
            stage=0,
            server_round=0,
            mechanism="record",
            unit=self.unit,
            sample_rate=work.sample_rate,
            noise_multiplier=noise_multiplier,
            steps=work.rounds * work.steps,
            max_grad_norm=bound,
            delta=delta,
            simulation_only=False,
            slack=slack_of(self.experiment, noise_multiplier, entries) if entries else 0.0,
            unit_column=self.experiment.privacy.unit_column,
            compared=True,  # where tasks compose in parallel, before each charge
        )

    def planned_sums(self, work: ReleaseSchedule, tasks: int, delta: float) -> LedgerEvent:
        """Return the class sums of a task that are taken beside learning, as one event."""
        noise = sums_noise_multiplier(self.experiment, tasks)
        rounds = work.model_copy(update={"rounds": work.sums, "steps": 1, "sample_rate": 1.0})
        event = self.planned(rounds, noise, delta, self.experiment.privacy.max_grad_norm)
        return replace(event, slack=slack_of(self.experiment, noise, MOST_ENTRIES, summed=True))

    def planned_counts(self, evaluations: int, delta: float) -> LedgerEvent:
        """Return all evaluations as one event."""
        work = ReleaseSchedule(task="", records=0, rounds=evaluations, sample_rate=1.0, steps=1)
        return self.planned(work, METRICS_NOISE, delta, sensitivity(1, 1))

    def update(
        self, ask: UpdateRequest, seeded: bool, plan: PrivacyPlan, policy: Policy | None
    ) -> LedgerEvent:
        """Return the ledger's event of a round; ``seeded``: its noise is; ``policy``: of the site.

        Raises:
            UserError: of a task that was not planned.
        """
        work = next((w for w in plan.work if w.task == ask.task), None)
        if work is None:
            raise UserError(f"task '{ask.task}' is not in the plan of this run")
        privacy = self.experiment.privacy
        rate, steps, noise = work.sample_rate, work.steps, plan.noise_multiplier
        beside = ask.statistics is not None and ask.phase != LEARN
        if beside:
            rate, steps, noise = 1.0, 1, sums_noise_multiplier(self.experiment, len(plan.work))
        return LedgerEvent(
            run=self.run,
            task=ask.task,
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            mechanism="record",
            unit=self.unit,
            sample_rate=rate,
            noise_multiplier=noise,
            steps=steps,
            max_grad_norm=plan.max_grad_norm,
            delta=plan.delta,
            simulation_only=seeded,
            slack=slack_of(self.experiment, noise, ask.entries, summed=beside),
            assumes=trust_in_sum(privacy, policy) if in_sum(privacy) else "",
            unit_column=self.experiment.privacy.unit_column,
        )

    def counting(self, ask: UpdateRequest, seeded: bool, plan: PrivacyPlan) -> LedgerEvent:
        """Return one evaluation of the tasks that are asked for."""
        return LedgerEvent(
            run=self.run,
            task="",
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            mechanism=COUNTS,
            unit=self.unit,
            sample_rate=1.0,
            noise_multiplier=METRICS_NOISE,
            steps=1,
            max_grad_norm=sensitivity(ask.evaluated, len(ask.counted)),
            delta=plan.delta,
            simulation_only=seeded,
            unit_column=self.experiment.privacy.unit_column,
        )


MakeGradients = Callable[
    [Experiment, UpdateRequest, LedgerEvent, NoiseSource, Groups | None],
    PrivateGradients | NoisySum,
]
"""Of the event that the ledger charges."""


def site_gradients(
    experiment: Experiment,
    ask: UpdateRequest,
    event: LedgerEvent,
    noise: NoiseSource,
    groups: Groups | None,
) -> PrivateGradients:
    """Return the steps of a round, each with the whole noise."""
    expected = experiment.train.batch_size
    if experiment.privacy.sample_rate:
        units = len(ask.data) if groups is None else len(groups)
        expected = max(1, round(experiment.privacy.sample_rate * units))
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


def sum_gradients(
    experiment: Experiment,
    ask: UpdateRequest,
    event: LedgerEvent,
    noise: NoiseSource,
    groups: Groups | None,
) -> NoisySum:
    """Return the one sum of a round, with this site's share of the noise."""
    return NoisySum(
        data=ask.data,
        record_ids=ask.record_ids,
        sample_rate=event.sample_rate,
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=event.max_grad_norm,
        shares=shares_of(experiment),
        noise=noise,
        groups=groups,
    )


GRADIENTS: Mapping[str, MakeGradients] = {"client": site_gradients, "server": sum_gradients}
"""``train.step`` to what reads the records."""


def packed(made: LocalUpdate) -> bytes:
    """Return an update as bytes that a ledger keeps."""
    arrays = {key: np.ascontiguousarray(value) for key, value in made.arrays.items()}
    return save(arrays, {"figures": json.dumps(dict(made.figures))})


def unpacked(answer: bytes) -> LocalUpdate:
    """Undo :func:`packed`."""
    length = int.from_bytes(answer[:8], "little")
    header = json.loads(answer[8 : 8 + length])
    return LocalUpdate(load(answer), json.loads(header["__metadata__"]["figures"]))
