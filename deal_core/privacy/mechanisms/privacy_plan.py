"""What a site will do in a run: decided once, and kept in its ledger."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from deal_core.privacy.accounting.ledger_event import Budget
from deal_core.privacy.accounting.plan import ReleaseSchedule
from deal_core.privacy.policy import Policy


class PrivacyPlan(BaseModel):
    """What a site will do in a run; decided once, and kept in its ledger.

    Attributes:
        noise_multiplier: of every step of the run.
        epsilon, delta: the budget that it was solved for, past included.
        disjoint_tasks: how tasks compose.
        max_grad_norm: clipping bound.
        work: tasks with their rates.
        units: records (or groups) of the site, over all its tasks, when it was made.
    """

    model_config = ConfigDict(frozen=True)

    noise_multiplier: float
    epsilon: float
    delta: float
    disjoint_tasks: bool
    max_grad_norm: float
    work: tuple[ReleaseSchedule, ...]
    units: int = 0

    def records(self, task: str) -> int:
        """Number of the task's records (or groups) that the plan was made for."""
        return next(work.records for work in self.work if work.task == task)

    def rounds(self, task: str) -> int:
        """Number of rounds of a task that the plan was made for."""
        return next((work.rounds + work.sums for work in self.work if work.task == task), 0)

    def budget(self, policy: Policy | None) -> Budget:
        """What every charge is checked against: the policy may have become tighter since."""
        if policy is None:
            return Budget(self.epsilon, self.delta, self.disjoint_tasks)
        epsilon = min(self.epsilon, policy.max_epsilon or self.epsilon)
        delta = min(self.delta, policy.max_delta or self.delta)
        disjoint = self.disjoint_tasks and policy.disjoint_tasks
        planned = (self.epsilon, self.delta, self.disjoint_tasks)
        return Budget(
            epsilon=epsilon,
            delta=delta,
            disjoint_tasks=disjoint,
            any_choice=(epsilon, delta, disjoint) != planned,
        )
