"""Updates in a secure sum: a step of the server's optimiser on gradients, or the mean of what
clients have trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deal_core.aggregation import Aggregate, AggregationRule
from deal_core.lora.state import State
from deal_core.privacy.policy import at_server
from deal_core.secure_sum.layout import Layout
from deal_core.wire.secure_layout import layout_of
from server.round import Round
from server.round_sum import Sums
from server.secure.round import GradientStep, MeanUpdate, SumStep


@dataclass(frozen=True)
class UpdateSum:
    """Attributes: the ``round``; its aggregation ``rule``."""

    round: Round
    rule: AggregationRule

    @property
    def trained(self) -> frozenset[str]:
        """Those that the rule trains in the round."""
        return self.round.trained(self.rule)

    def clients(self) -> dict[str, str]:
        """Return a sample of those that have a task."""
        return self.round.sample(self.round.eligible)

    def layout(self, state: State, basis: str) -> Layout:
        """Return that of gradient sums, or of changes and their weight."""
        config = self.round.experiment
        return layout_of(config, state.current, self.trained, self._gradients, basis)

    def add(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state after the step."""
        return self._step(state, sums, self.round.step)

    @property
    def _gradients(self) -> bool:
        """Whether gradient sums are added up, and not updates."""
        return at_server(self.round.experiment)

    @property
    def _step(self) -> SumStep:
        """What is made of the sum."""
        if self._gradients:
            return GradientStep(self.round.experiment, len(self.round.plan.tasks))
        return MeanUpdate(self.rule)
