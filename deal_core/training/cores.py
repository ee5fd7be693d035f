"""Local steps on cores: the optimiser moves the small matrices, and ``lora_B`` follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.core import to_core


@dataclass(frozen=True)
class Core:
    """One layer's.

    Attributes:
        weight: ``lora_B``, ``(d_out, 2 r)``: ``F R``, and the frame ``F``.
        frame: ``F``, ``(d_out, r)``, orthonormal.
        values: ``R``, ``(r, r)``, which learns.
    """

    weight: nn.Parameter
    frame: Tensor
    values: nn.Parameter


class Cores:
    """The cores of all layers between their frames. Source: docs/method.md (M61)."""

    def __init__(self, cores: list[Core]) -> None:
        self._cores = cores
        self.parameters = [core.values for core in cores]

    def before_step(self) -> None:
        """Take the gradients of ``lora_B`` back to the cores."""
        for core in self._cores:
            if core.weight.grad is not None:
                core.values.grad = to_core(core.weight.grad, core.frame)
            core.weight.grad = None

    def after_step(self) -> None:
        """Make ``F R`` anew."""
        for core in self._cores:
            size = core.values.shape[1]
            with torch.no_grad():
                core.weight[:, :size] = core.frame @ core.values

    def finish(self) -> None:
        """All is in the model."""


def cores_of(module: nn.Module) -> list[Core]:
    """Return the cores of a model that holds a core adapter; none of another kind."""
    framed = [layer for layer in lora_layers(module).values() if layer.frame is not None]
    pairs = [(layer.lora_B[CURRENT].weight, layer.frame) for layer in framed]
    return [Core(B, frame, nn.Parameter(to_core(B.detach(), frame))) for B, frame in pairs]
