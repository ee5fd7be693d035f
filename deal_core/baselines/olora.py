"""Baseline ``olora``: an adapter per task, kept out of the row spaces of all earlier ones.

Every task learns a new adapter; those of earlier tasks are frozen, and their sum is the model at
the start of the task. A penalty pulls the new ``A`` to rows that are orthogonal to every earlier
``A``. Source: docs/method.md (M21); Wang et al., Findings of EMNLP 2023, arXiv 2310.14152. The
overlap is squared; the authors' code sums absolute values, whose gradient does not vanish with the
overlap: under Adam it shakes rows that are orthogonal already.

As in the paper, all adapters are kept as they were learnt, stacked in the retained one, so the
model grows by ``adapter.rank`` a task. ``adapter.retained_rank`` counts for nothing. Other than in
the paper, a new ``A`` starts orthogonal to the earlier ones instead of at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.baselines.sequential import Sequential
from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.deal.interface import LocalTask
from deal_core.deal.objective import Penalised, plain
from deal_core.lora.adapter import Adapter, LoraFactors, orthogonal_init, stack, zero_adapter
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State
from deal_core.models import Encoded, LanguageModel
from deal_core.training.batching import Cache
from deal_core.training.loop import Objective


@dataclass(frozen=True)
class OLora(Sequential):
    """Attributes: the ``weight`` of ``||A_earlier A^T||_F^2``, summed over layers."""

    weight: float = 0.5

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Start a fresh current adapter outside the row space of the earlier ones."""
        scaling = self.adapter.lora_alpha / self.adapter.rank
        current = orthogonal_init(state.retained, self.adapter.rank, scaling, generator)
        return State(current, state.retained)

    def end_task(self, state: State) -> State:
        """Return the same model: the task's adapter stands frozen beside the earlier ones, stacked
        in the retained one, and the current one is zero."""
        current = state.current
        nothing = zero_adapter(current.shapes, current.rank, current.scaling)
        return State(nothing, in_use(stack(state.parts())))

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``CE + weight * ||A_earlier A^T||_F^2``."""
        learning = plain(model, task, data)
        if self.weight == 0:
            return learning
        earlier = {n: f.A.to(model.device) for n, f in state.retained.layers.items()}
        return Penalised(learning, lambda: overlap(model.module, earlier, self.weight))


def in_use(adapter: Adapter) -> Adapter:
    """Leave out directions that change nothing: ``B`` zero in every layer; keep one at least."""
    used = torch.stack([f.B.any(dim=0) for f in adapter.layers.values()]).any(dim=0)
    used[0] |= not used.any()
    layers = {n: LoraFactors(f.A[used], f.B[:, used]) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.scaling)


def overlap(module: nn.Module, earlier: dict[str, Tensor], weight: float) -> Tensor | None:
    """Return ``weight * sum_layers ||A_earlier A^T||_F^2``; None in a round that leaves A alone.

    Args:
        module: holds the current adapter.
        earlier: layer name to the rows of all earlier ``A``, ``(rank so far, d_in)``.
        weight: 0 leaves the rows free; a large one keeps them orthogonal.
    """
    current = {n: layer.lora_A[CURRENT].weight for n, layer in lora_layers(module).items()}
    if not any(A.requires_grad for A in current.values()):
        return None
    return (
        weight * torch.stack([(earlier[n] @ A.T).square().sum() for n, A in current.items()]).sum()
    )


def make_olora(method: MethodConfig, adapter: AdapterConfig) -> OLora:
    """Build from the experiment."""
    return OLora(adapter)
