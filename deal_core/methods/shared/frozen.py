"""Methods that train nothing: the base model stays as it is, and labels get heads from sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deal_core.config.experiment import AdapterConfig
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.methods.interface import LocalTask, Phase, Statistics
from deal_core.models import Encoded, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective


@dataclass(frozen=True)
class Frozen:
    """Attributes: ``phases`` that add up statistics, one in the place of learning."""

    adapter: AdapterConfig
    phases: tuple[Phase, ...]

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Keep everything; next to nothing travels for adapters that are zero."""
        if state.current.rank == state.retained.rank == 1:
            return state
        shapes, alpha = state.current.shapes, self.adapter.lora_alpha
        return replace(
            state, current=zero_adapter(shapes, 1, alpha), retained=zero_adapter(shapes, 1)
        )

    def end_task(self, state: State) -> State:
        """Keep everything as it is."""
        return state

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Raise :class:`NotImplementedError`: every phase adds up statistics."""
        return no_objective(model, state, task, data, cache)


def no_objective(
    model: LanguageModel, state: State, task: LocalTask, data: Sequence[Encoded], cache: Cache
) -> Objective:
    """The objective of a phase in which nothing is trained."""
    raise NotImplementedError("nothing is trained in a phase of statistics")


def statistics_phase(name: str, rounds: int, statistics: Statistics) -> Phase:
    """Return a phase in which nothing is trained, and the state is as it was before."""
    return Phase(name, rounds, no_objective, statistics)
