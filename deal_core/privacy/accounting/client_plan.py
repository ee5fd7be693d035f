"""One noise multiplier for all rounds of a run, where what is protected is a whole client."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from deal_core.config.experiment import Experiment
from deal_core.methods import method_of
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.accounting.ledger_event import Budget, LedgerEvent, composed
from deal_core.privacy.accounting.plan import planned_work, solve_noise_multiplier
from deal_core.privacy.accounting.run_name import run_name
from deal_core.privacy.accounting.unit import CLIENT
from deal_core.privacy.policy import Policy, default_delta


class ClientPlan(BaseModel):
    """Decided once, and kept in a ledger.

    Attributes:
        noise_multiplier: of every round.
        epsilon, delta: the budget that it was solved for, the ledger's past included.
    """

    model_config = ConfigDict(frozen=True)

    noise_multiplier: float
    epsilon: float
    delta: float

    def budget(self, policy: Policy | None) -> Budget:
        """Return what every charge is checked against: a client is in all tasks, and a site's
        policy may have become tighter since."""
        epsilon = min(self.epsilon, (policy.max_epsilon if policy else 0.0) or self.epsilon)
        delta = min(self.delta, (policy.max_delta if policy else 0.0) or self.delta)
        return Budget(epsilon, delta, whole_client=True)


def client_plan(
    experiment: Experiment,
    ledger: Ledger,
    rounds: int,
    sample_rate: float,
    policy: Policy | None = None,
    largest_delta: float = 1.0,
    run: str = "",
) -> ClientPlan:
    """Return the run's plan as the ledger has it; made with the first round.

    Args:
        experiment: epsilon, delta and clipping bound that are asked for.
        ledger: keeps the plan, and has the past.
        rounds: releases of the whole run, at most.
        sample_rate: probability that a client is in a round.
        policy: of a site, which can only tighten.
        largest_delta: whatever the experiment asks, unless the policy names another.
        run: whose plan it is; empty: that of all runs of these settings.

    Raises:
        NoFeasibleNoise: the ledger's past leaves nothing, or nothing that could be learnt with.
    """

    def solve(past: Sequence[LedgerEvent]) -> str:
        privacy = experiment.privacy
        wanted = privacy.target_delta or default_delta(experiment.federation.clients)
        delta = min(wanted, (policy.max_delta if policy else 0.0) or largest_delta)
        limit = (policy.max_epsilon if policy else 0.0) or privacy.target_epsilon
        epsilon = min(privacy.target_epsilon, limit)

        def epsilon_with(multiplier: float) -> float:
            planned = client_event(experiment, sample_rate, multiplier, delta, steps=rounds)
            return composed([*past, planned], delta)

        multiplier = solve_noise_multiplier(epsilon_with, epsilon)
        return ClientPlan(
            noise_multiplier=multiplier, epsilon=epsilon, delta=delta
        ).model_dump_json()

    return ClientPlan.model_validate_json(ledger.plan(run or run_name(experiment), solve))


def client_event(
    experiment: Experiment,
    sample_rate: float,
    noise_multiplier: float,
    delta: float,
    steps: int = 1,
    place: tuple[str, str, int, int] = ("", "", 0, 0),
    simulation_only: bool = False,
    assumes: str = "",
    run: str = "",
) -> LedgerEvent:
    """Return one round, or several, as a ledger has it.

    Args:
        experiment: names the run, and the clipping bound.
        sample_rate: probability that a client is in a round.
        noise_multiplier: of the sum of clipped updates, in units of the bound.
        delta: at which the run's epsilon is said.
        steps: rounds that the event stands for.
        place: task, phase, stage and round.
        simulation_only: the noise came from a seed.
        assumes: whom the noise takes to be honest; empty: nobody outside the client.
        run: as of :func:`client_plan`.
    """
    task, phase, stage, server_round = place
    return LedgerEvent(
        run=run or run_name(experiment),
        task=task,
        phase=phase,
        stage=stage,
        server_round=server_round,
        mechanism="client",
        unit=CLIENT,
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        steps=steps,
        max_grad_norm=experiment.privacy.max_update_norm,
        delta=delta,
        simulation_only=simulation_only,
        assumes=assumes,
    )


def client_rounds(experiment: Experiment, tasks: Sequence[str]) -> int:
    """In how many rounds a client may take part, at most, on private data."""
    phases = method_of(experiment).phases
    work = planned_work(experiment, phases, dict.fromkeys(tasks, 1))
    return sum(each.rounds for each in work)
