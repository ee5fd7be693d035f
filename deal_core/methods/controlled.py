"""An objective with the price of the update: the penalty of the controlled update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.adapters import Adapter, LoraFactors
from deal_core.attach import CURRENT, lora_layers
from deal_core.config import UpdateConfig
from deal_core.methods.interface import Objective
from deal_core.update import Anchor, update_penalty


@dataclass(frozen=True)
class Controlled:
    """What ``objective`` minimises, and the penalty on what the task changes.

    Attributes:
        objective: the losses of examples, and a penalty of its own or none.
        module: holds the current adapter, whose factors get the gradient.
        beside: layer name to what the task has changed that is not in the current adapter, on
            the module's device; empty where there is none. See :func:`beside_current`.
        anchors: the retained directions of every layer.
        config: weights and powers.
    """

    objective: Objective
    module: nn.Module
    beside: Mapping[str, LoraFactors]
    anchors: Mapping[str, Anchor]
    config: UpdateConfig

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Those of the objective, ``(batch,)``."""
        return self.objective.example_losses(batch)

    def penalty(self) -> Tensor:
        """The objective's own, and the price of the update as it is now; a scalar."""
        own = self.objective.penalty()
        update = live_update(self.module, self.beside)
        price = update_penalty(update, self.anchors, self.config)
        return price if own is None else own + price


def beside_current(residual: Adapter | None, device: torch.device) -> dict[str, LoraFactors]:
    """Return layer name to the residual's factors, scaling included."""
    if residual is None:
        return {}
    return {
        name: LoraFactors(f.A.to(device), (residual.scaling * f.B).to(device))
        for name, f in residual.layers.items()
    }


def live_update(module: nn.Module, beside: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return layer name to factors of what the task changes, scaling included, with gradient."""
    update = {}
    for name, layer in lora_layers(module).items():
        A = layer.lora_A[CURRENT].weight
        B = layer.scaling[CURRENT] * layer.lora_B[CURRENT].weight
        if name in beside:
            A = torch.cat([A, beside[name].A], dim=0)
            B = torch.cat([B, beside[name].B], dim=1)
        update[name] = LoraFactors(A, B)
    return update
