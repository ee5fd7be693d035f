"""Mechanism ``record``: DP-SGD at the client, so that no record of a site can be told from the
updates that it sends; what is planned, charged and released. A step of it:
:mod:`deal_core.privacy.mechanisms.private_gradients`.

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
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import load, save

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.privacy.accounting.common_noise import common_noise_multiplier
from deal_core.privacy.accounting.ledger import Budget, BudgetSpent, LedgerEvent, composed
from deal_core.privacy.accounting.plan import (
    NoFeasibleNoise,
    ReleaseSchedule,
    at_server,
    evaluations,
    in_sum,
    planned_work,
    solve_noise_multiplier,
)
from deal_core.privacy.accounting.run_name import run_name
from deal_core.privacy.accounting.unit import RECORD as RECORD_UNIT
from deal_core.privacy.accounting.unit import MixedUnits, unit_of
from deal_core.privacy.interface import (
    Counts,
    Grouping,
    LocalUpdate,
    Permit,
    Refusal,
    Site,
    UpdateRequest,
)
from deal_core.privacy.mechanisms.counts import noised_counts, sensitivity
from deal_core.privacy.mechanisms.definition import MechanismDefinition, nobody_trusted
from deal_core.privacy.mechanisms.groups import Groups
from deal_core.privacy.mechanisms.guards import UnsafeModel, require_planned
from deal_core.privacy.mechanisms.noise import SecureNoise, SeededNoise
from deal_core.privacy.mechanisms.noise_floor import entry_noise
from deal_core.privacy.mechanisms.noisy_sum import NoisySum
from deal_core.privacy.mechanisms.none import clear_counts
from deal_core.privacy.mechanisms.one_task_at_a_time import check_one_task_at_a_time
from deal_core.privacy.mechanisms.private_gradients import PrivateGradients
from deal_core.privacy.mechanisms.record_gradients import GRADIENTS
from deal_core.privacy.mechanisms.shares import require_shares, slack_of, trust_in_sum
from deal_core.privacy.policy import Policy, metrics_allowed, terms
from deal_core.randomness import seeded

log = logging.getLogger(__name__)


class PrivacyPlan(BaseModel):
    """What a site will do in a run; decided once, and kept in its ledger.

    Attributes:
        noise_multiplier: of every step of the run.
        epsilon, delta: the budget that it was solved for, past included.
        disjoint_tasks: how tasks compose.
        max_grad_norm: clipping bound.
        work: tasks with their rates.
    """

    model_config = ConfigDict(frozen=True)

    noise_multiplier: float
    epsilon: float
    delta: float
    disjoint_tasks: bool
    max_grad_norm: float
    work: tuple[ReleaseSchedule, ...]

    def records(self, task: str) -> int:
        """Number of the task's records (or groups) that the plan was made for."""
        return next(work.records for work in self.work if work.task == task)

    def budget(self, policy: Policy | None) -> Budget:
        """What every charge is checked against: the policy may have become tighter since."""
        if policy is None:
            return Budget(self.epsilon, self.delta, self.disjoint_tasks)
        return Budget(
            epsilon=min(self.epsilon, policy.max_epsilon or self.epsilon),
            delta=min(self.delta, policy.max_delta or self.delta),
            disjoint_tasks=self.disjoint_tasks and policy.disjoint_tasks,
        )


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
        kept = ledger.answer(ask.request)
        if kept is not None:
            return unpacked(kept)
        try:
            with refusing_when_spent():
                require_shares(self.experiment.privacy, site.policy)
                plan = self._plan(ask, site)
                budget = plan.budget(site.policy)
                if budget.disjoint_tasks:
                    ledger.declare_members(ask.task, ask.ids(), self.unit)
                event = self._event(ask, site, plan)
                planned, groups = plan.records(ask.task), self._groups(ask)
                require_planned(ask.record_ids, len(ask.data), ask.task, planned, groups)
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
        budget = plan.budget(site.policy)
        with refusing_when_spent():
            answer = packed(LocalUpdate(update.arrays, self._figures(ask, site, plan, event)))
            return unpacked(site.ledger().charge(event, budget, ask.request, answer))

    def _figures(
        self, ask: UpdateRequest, site: Site, plan: PrivacyPlan, event: LedgerEvent
    ) -> dict[str, float]:
        """What goes with an update: of rates, noise and steps, not of data."""
        figures = {
            "num_examples": 1.0,  # every client weighs the same: a count is a release
            "simulation_only": float(event.simulation_only),
        }
        policy = site.policy
        if policy is None or policy.share_num_examples:  # the steps tell the number of records
            figures |= {"noise_floor": entry_noise(event.steps, ask.learning_rate)}
        if policy is None or policy.spending:
            disjoint = plan.budget(policy).disjoint_tasks
            epsilon = composed([*site.ledger().events(), event], plan.delta, disjoint)
            figures |= {"epsilon": epsilon, "delta": plan.delta}
            figures |= {"disjoint_tasks": 1.0} if disjoint else {}
        return figures

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """Return the counts in the clear, or with noise that is charged like an update.

        Raises:
            Refusal: they may not leave, or the budget is spent.
        """
        allowed = metrics_allowed(self.experiment.privacy.metrics, site.policy)
        if allowed == "none":
            raise Refusal("withheld", "counts of right answers do not leave this site")
        if allowed == "clear":
            return clear_counts(self.experiment, ask, site, make)
        ledger = site.ledger()
        kept = ledger.answer(ask.request)
        if kept is None:
            try:
                plan = self._plan(ask, site)
                budget = plan.budget(site.policy)
                event = self._counting(ask, site, plan)
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
        nothing: that it does tells of data."""
        noise = self._noise(ask) if event.simulation_only else SecureNoise()
        try:
            counts = make()
        except Exception:
            log.exception("counts could not be made; noise alone leaves")
            counts = dict.fromkeys(ask.counted, [0] * ask.evaluated)
        return json.dumps(dict(noised_counts(counts, event.noise_multiplier, noise))).encode()

    def _plan(self, ask: UpdateRequest, site: Site) -> PrivacyPlan:
        """The run's plan as the ledger has it; made with the first round."""

        def solve(past: Sequence[LedgerEvent]) -> str:
            return self._solve(past, *self._counts(ask), site, ask.entries).model_dump_json()

        return PrivacyPlan.model_validate_json(site.ledger().plan(self._run, solve))

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
        counted = metrics_allowed(config.privacy.metrics, site.policy) == "noised"
        counts = evaluations(config, len(records)) if counted else 0

        def epsilon_with(noise_multiplier: float) -> float:
            planned = [
                self._planned(each, noise_multiplier, agreed.delta, agreed.max_grad_norm, entries)
                for each in work
            ]
            planned += [self._planned_counts(counts, agreed.delta)] if counts else []
            return composed([*past, *planned], agreed.delta, disjoint)

        return PrivacyPlan(
            noise_multiplier=self._multiplier(epsilon_with, agreed.epsilon, len(records)),
            epsilon=agreed.epsilon,
            delta=agreed.delta,
            disjoint_tasks=disjoint,
            max_grad_norm=agreed.max_grad_norm,
            work=tuple(work),
        )

    def _multiplier(
        self, epsilon_with: Callable[[float], float], epsilon: float, tasks: int
    ) -> float:
        """That of all sites, where they make the noise together; else the smallest that fits."""
        if not at_server(self.experiment):
            return solve_noise_multiplier(epsilon_with, epsilon)
        common = common_noise_multiplier(self.experiment, tasks)
        if epsilon_with(common) > epsilon:
            raise NoFeasibleNoise(
                f"noise of {common:.2f} clipping bounds, that of all sites, takes epsilon to "
                f"{epsilon_with(common):.4g} here, and {epsilon:g} are left; raise the budget, or "
                "plan the run with a smaller privacy.target_epsilon or target_delta"
            )
        return common

    def _planned(
        self,
        work: ReleaseSchedule,
        noise_multiplier: float,
        delta: float,
        bound: float,
        entries: int = 0,
    ) -> LedgerEvent:
        """All rounds of a task as one event."""
        return LedgerEvent(
            run=self._run,
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
        )

    def _planned_counts(self, evaluations: int, delta: float) -> LedgerEvent:
        """All evaluations as one event."""
        work = ReleaseSchedule(task="", records=0, rounds=evaluations, sample_rate=1.0, steps=1)
        return self._planned(work, self.experiment.privacy.metrics_noise, delta, sensitivity(1, 1))

    def _event(self, ask: UpdateRequest, site: Site, plan: PrivacyPlan) -> LedgerEvent:
        """Return the ledger's event of this round.

        Raises:
            UserError: of a task that was not planned.
        """
        work = next((w for w in plan.work if w.task == ask.task), None)
        if work is None:
            raise UserError(f"task '{ask.task}' is not in the plan of this run")
        privacy = self.experiment.privacy
        return LedgerEvent(
            run=self._run,
            task=ask.task,
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            mechanism="record",
            unit=self.unit,
            sample_rate=work.sample_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=work.steps,
            max_grad_norm=plan.max_grad_norm,
            delta=plan.delta,
            simulation_only=self._seeds(site),
            slack=slack_of(self.experiment, plan.noise_multiplier, ask.entries),
            assumes=trust_in_sum(privacy) if in_sum(privacy) else "",
            unit_column=self.experiment.privacy.unit_column,
        )

    def _counting(self, ask: UpdateRequest, site: Site, plan: PrivacyPlan) -> LedgerEvent:
        """One evaluation of the tasks that are asked for."""
        return LedgerEvent(
            run=self._run,
            task="",
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            mechanism="counts",
            unit=self.unit,
            sample_rate=1.0,
            noise_multiplier=self.experiment.privacy.metrics_noise,
            steps=1,
            max_grad_norm=sensitivity(ask.evaluated, len(ask.counted)),
            delta=plan.delta,
            simulation_only=self._seeds(site),
            unit_column=self.experiment.privacy.unit_column,
        )

    def _gradients(
        self, ask: UpdateRequest, site: Site, event: LedgerEvent
    ) -> PrivateGradients | NoisySum:
        noise = self._noise(ask) if event.simulation_only else SecureNoise()
        numbers = self._groups(ask)
        groups = None if numbers is None else Groups(numbers)
        make = GRADIENTS[self.experiment.train.step]
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

    @cached_property
    def _run(self) -> str:
        return run_name(self.experiment)


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


UNPROTECTED: Mapping[str, str] = {
    "ewc": "Fisher information of earlier records goes into every update unclipped",
    "replay": "earlier texts are trained on beside the batch",
}
"""Methods whose updates tell of records that are not in the batch, and how."""


def check_records_protected(experiment: Experiment) -> None:
    """Check that nothing but the records of a batch reaches an update.

    Raises:
        UserError: the experiment has a part that reads others.
    """
    where, method = f'privacy.mechanism = "{experiment.privacy.mechanism}"', experiment.method.name
    if method in UNPROTECTED:
        raise UserError(
            f"{where} does not go with method.name '{method}': {UNPROTECTED[method]}; use "
            "deal, lwf, nlora, olora, sequential or slao"
        )
    if method == "deal-reference" and experiment.privacy.factors == "one":
        raise UserError(
            f"{where} trains one factor a round, method.name '{method}' needs both; set "
            'privacy.factors to "both", or choose another method'
        )
    if experiment.method.logit_adjustment:
        raise UserError(
            f"{where} protects single records, and method.logit_adjustment reads the labels of all "
            "of a site's; set it to 0"
        )
    if experiment.train.precision == "bfloat16":
        raise UserError(
            f'{where} does not go with train.precision = "bfloat16", in which the rounding of a '
            'record\'s gradient depends on other records; set it to "auto" or "float32"'
        )
    if experiment.privacy.unit_column and experiment.data.max_train:
        raise UserError(
            f"{where} with privacy.unit_column protects groups, and which records "
            "data.max_train takes depends on how many a group has; set it to 0, and take fewer "
            "groups by data.train_share"
        )
    check_one_task_at_a_time(experiment)
    if in_sum(experiment.privacy) and not at_server(experiment):
        raise UserError(
            'privacy.noise_share = "sum": only one sum has the whole noise; set train.step to '
            '"server"'
        )


def whom_to_trust(privacy: PrivacyConfig) -> str:
    """Return whom an epsilon takes to be honest."""
    return trust_in_sum(privacy) if in_sum(privacy) else nobody_trusted(privacy)


RECORD = MechanismDefinition(
    client=RecordMechanism,
    attacked="steps",
    check=check_records_protected,
    assumes=whom_to_trust,
    needs_float32=True,
)
