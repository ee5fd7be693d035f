"""Mechanism ``client`` at a trusted server: a round releases one noisy mean.

Every client is in it with the same probability, by a draw of its own that nobody else sees; its
update is clipped; Gaussian noise is added to the sum, and the whole is divided by the expected
number of clients, whoever answered. The aggregation rule then gets that mean as if it were one
client's update: it is post-processing.

Unit of privacy: one client, there or not, with all its records. Adversary: everybody but the
server, in sight of every model that it hands out.

Sources: McMahan et al., ICLR 2018, algorithm 1; Andrew et al., NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import load, save

from deal_core.aggregation import Aggregate, Aggregation, AggregationRule, ClientUpdate
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter
from deal_core.privacy.accounting.client_plan import ClientPlan, client_event, client_plan
from deal_core.privacy.accounting.ledger import Ledger, LedgerError
from deal_core.privacy.accounting.ledger_event import HONEST_SERVER, BudgetSpent, composed
from deal_core.privacy.accounting.plan import NoFeasibleNoise
from deal_core.privacy.accounting.run_name import run_name
from deal_core.privacy.mechanisms.clipped_mean import ClippedSum, moved
from deal_core.privacy.mechanisms.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.mechanisms.server_side import RoundContext
from deal_core.randomness import seeded


@contextmanager
def ledger_faults_stop() -> Iterator[None]:
    """Within the block, or the function, a ledger that cannot be used ends the run with its line:
    it is no fault of numbers, after which a run would go on.

    Yields:
        Nothing.

    Raises:
        UserError: in the place of a ``LedgerError``.
    """
    try:
        yield
    except LedgerError as fault:
        raise UserError(str(fault)) from None


@dataclass(frozen=True)
class CentralDP:
    """The server clips, adds noise and accounts.

    Attributes:
        rounds: of the run, at most. ledger: the server's, in the run folder.
    """

    experiment: Experiment
    rounds: int
    ledger: Ledger
    releases_noise: bool = True

    @property
    def sample_rate(self) -> float:
        """Probability that a client is in a round."""
        federation = self.experiment.federation
        return min(1.0, (federation.clients_per_round or federation.clients) / federation.clients)

    @property
    @ledger_faults_stop()
    def plan(self) -> ClientPlan:
        """The run's.

        Raises:
            UserError: no noise that is of use fits the budget.
        """
        try:
            return client_plan(self.experiment, self.ledger, self.rounds, self.sample_rate)
        except NoFeasibleNoise:
            raise UserError(
                f"privacy.target_epsilon = {self.experiment.privacy.target_epsilon:g} leaves "
                f"nothing to learn with in {self.rounds} rounds; raise it, or take fewer rounds"
            ) from None

    def sample(self, names: Sequence[str], stage: int, server_round: int) -> list[str]:
        """Everyone with the same probability, independently: it may be nobody."""
        drawn = self._noise("sample", stage, server_round).uniform(len(names)) <= self.sample_rate
        return [name for name, taken in zip(names, drawn.tolist(), strict=True) if taken]

    def begin(
        self, rule: AggregationRule, before: Adapter, trained: frozenset[str], place: RoundContext
    ) -> Aggregation:
        """A round that releases one noisy mean."""
        return NoisyRound(self, rule, before, trained, place)

    @ledger_faults_stop()
    def spent(self, clients: Sequence[str], eligible: int) -> Mapping[str, Mapping[str, float]]:
        """The same for every client: who was drawn stays secret."""
        plan, events = self.plan, self.ledger.events()
        # of the mean, told as if each client had brought its part of it
        floor = self._scale(plan) / (self.sample_rate * eligible) * len(clients) ** 0.5
        figures = {
            "epsilon": composed(events, plan.delta),
            "delta": plan.delta,
            "simulation_only": float(any(event.simulation_only for event in events)),
            "noise_floor": floor,
        }
        return dict.fromkeys(clients, figures)

    @ledger_faults_stop()
    def released(self, clipped_sum: ClippedSum, place: RoundContext) -> dict[str, np.ndarray]:
        """Return the noisy mean of a round, charged before it is known: asked for again, it is the
        same.

        Raises:
            UserError: the budget is spent.
        """
        plan = self.plan
        request = f"{run_name(self.experiment)} {place.phase} {place.stage} {place.server_round}"
        event = client_event(
            self.experiment,
            self.sample_rate,
            plan.noise_multiplier,
            plan.delta,
            place=("", place.phase, place.stage, place.server_round),
            simulation_only=self._seeds,
            assumes=HONEST_SERVER,
        )
        try:
            kept = self.ledger.answer(request)
            if kept is None:
                self.ledger.require(event, plan.budget(None))
                noise = self._noise("noise", place.stage, place.server_round)
                expected = self.sample_rate * place.eligible
                mean = clipped_sum.noisy_mean(plan.noise_multiplier, expected, noise)
                answer = save({name: part.numpy() for name, part in mean.items()})
                kept = self.ledger.charge(event, plan.budget(None), request, answer)
        except BudgetSpent as spent:
            raise UserError(f"the clients' budget is spent: {spent}; see privacy") from None
        return load(kept)

    @property
    def _seeds(self) -> bool:
        """Only where it is asked for: nobody can tell a server in a simulation from a real one."""
        return self.experiment.privacy.noise == "seeded"

    def _noise(self, purpose: str, stage: int, server_round: int) -> NoiseSource:
        if not self._seeds:
            return SecureNoise()
        where = purpose, stage, server_round
        return SeededNoise(seeded(self.experiment.run.seed, "client privacy", *where))

    def _scale(self, plan: ClientPlan) -> float:
        return plan.noise_multiplier * self.experiment.privacy.max_update_norm


class NoisyRound:
    """One round: clipped updates in, one noisy mean out, through the experiment's rule."""

    def __init__(
        self,
        side: CentralDP,
        rule: AggregationRule,
        before: Adapter,
        trained: frozenset[str],
        place: RoundContext,
    ) -> None:
        self._side, self._rule, self._before, self._place = side, rule, before, place
        self._sum = ClippedSum(before, trained, side.experiment.privacy.max_update_norm)

    def add(self, update: ClientUpdate) -> None:
        """Add a clipped update; its weight plays no part.

        Raises:
            ValueError: another shape than the round's.
        """
        self._sum.add(update.adapter)

    def finish(self) -> Aggregate:
        """Return the rule's aggregate of the noisy mean.

        Raises:
            UserError: the budget is spent.
        """
        mean = self._side.released(self._sum, self._place)
        change = {name: torch.from_numpy(part) for name, part in mean.items()}
        aggregation = self._rule.begin(self._before, self._place.server_round)
        aggregation.add(ClientUpdate("all", moved(self._before, change), 1.0))
        return aggregation.finish()
