"""Baseline ``nlora``: an adapter per task, kept sparse so that tasks change other weights.

Every task learns a new adapter; those of earlier tasks are frozen, and their sum is the model at
the start of the task, as in ``olora``. A penalty on the absolute values of the update's entries
leaves few of them away from zero, so two tasks seldom change the same one. It knows nothing of
earlier tasks. Source: docs/method.md (M45); Yang et al., COLING 2025, arXiv 2410.10179.

The penalty is the paper's, ``lambda sum |Delta W|`` over the entries of every layer's update, here
with LoRA's scaling in it. The authors' code multiplies the stored factors the other way round,
``A B`` of shape ``(r, r)`` (commit 7301afe, ``src/uie_trainer_lora.py``), which is not the update
and needs square layers; their weights, 0.4 to 1.8, belong to that sum of a few numbers. The sum
over whole layers is thousands of times as long, so its weight is that much smaller.

Other than in the paper, a new ``A`` has orthonormal rows, drawn without regard to earlier tasks.
``Delta W`` of one layer is formed in every step: the only method here that needs the memory of a
whole weight for it. ``adapter.retained_rank`` counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import orthogonal_init, zero_adapter
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State
from deal_core.methods.interface import LocalTask, Phase
from deal_core.methods.shared.kept_whole import frozen_beside
from deal_core.methods.shared.penalised import Penalised
from deal_core.methods.shared.plain import plain
from deal_core.models import Encoded, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective


@dataclass(frozen=True)
class NLora:
    """Attributes: ``adapter`` (rank, alpha) and the ``weight`` of the penalty."""

    adapter: AdapterConfig
    weight: float
    phases: tuple[Phase, ...] = ()

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Start a fresh current adapter, drawn without regard to the earlier ones."""
        rank, scaling = self.adapter.rank, self.adapter.lora_alpha / self.adapter.rank
        nothing = zero_adapter(state.retained.shapes, 1)
        return State(orthogonal_init(nothing, rank, scaling, generator), state.retained)

    def end_task(self, state: State) -> State:
        """Freeze the task's adapter beside the earlier ones."""
        return frozen_beside(state)

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``CE + weight * sum |s B A|``."""
        learning = plain(model, task, data)
        if self.weight == 0:
            return learning
        return Penalised(learning, lambda: self.weight * absolute_sum(model.module))


def absolute_sum(module: nn.Module) -> Tensor:
    """Return ``sum_layers sum_ij |(s B A)_ij|`` of the current adapter that ``module`` holds."""
    sums = [
        layer.scaling[CURRENT]
        * (layer.lora_B[CURRENT].weight @ layer.lora_A[CURRENT].weight).abs().sum()
        for layer in lora_layers(module).values()
    ]
    return torch.stack(sums).sum()


def make_nlora(method: MethodConfig, adapter: AdapterConfig) -> NLora:
    """Build from the experiment."""
    return NLora(adapter, method.nlora.weight)
