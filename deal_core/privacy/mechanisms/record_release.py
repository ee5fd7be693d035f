"""One release under mechanism ``record``: the event that the ledger charges, what the records are
read through, and the answer as bytes that the ledger keeps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from safetensors.numpy import load, save

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.privacy.counts import sensitivity
from deal_core.privacy.distributed_noise import (
    NoisySum,
    shares_of,
    slack_of,
    trust_in_sum,
)
from deal_core.privacy.dpsgd import Groups, PrivateGradients
from deal_core.privacy.events import COUNTS, LedgerEvent
from deal_core.privacy.interface import LocalUpdate, UpdateRequest
from deal_core.privacy.noise import NoiseSource
from deal_core.privacy.plan import (
    METRICS_NOISE,
    PrivacyPlan,
    ReleaseSchedule,
    sums_noise_multiplier,
)
from deal_core.privacy.policy import Policy, in_sum
from deal_core.wire.instruction import LEARN

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
