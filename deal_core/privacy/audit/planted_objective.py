"""An objective whose batch holds canaries beside records.

The loss of a canary is linear in its own copies of the factors (see
:mod:`deal_core.lora.per_example`): its gradient is its direction, far longer than any bound. It
arises in the same backward pass as those of the records, and is clipped, or is not, with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deal_core.lora.attach import CURRENT, learning_factors, lora_layers
from deal_core.privacy.audit.canaries import ENTRY, GradientCanaries
from deal_core.training.loop import Objective


@dataclass(frozen=True)
class PlantedObjective:
    """Attributes: ``inner``, of records; ``module``, whose factors learn; ``records``, how many:
    the canaries' positions follow, ``records_each`` for each; ``length``, of the gradient of each.
    A canary whose coin says that it is not there has no gradient."""

    inner: Objective
    module: nn.Module
    records: int
    canaries: GradientCanaries
    length: float
    records_each: int = 1

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of records and canaries, ``(batch,)``, in their order."""
        rows = [row for row, position in enumerate(batch) if position < self.records]
        planted = [row for row, position in enumerate(batch) if position >= self.records]
        losses = torch.zeros(len(batch), device=next(self.module.parameters()).device)
        if rows:
            with _copies_of(self.module, rows):
                own = self.inner.example_losses([batch[row] for row in rows])
            losses = losses.index_add(0, _index(rows, losses), own.to(losses.dtype))
        if planted:
            places = np.array([batch[row] for row in planted])
            numbers = (places - self.records) // self.records_each
            losses = losses + self._linear(numbers, np.array(planted), len(batch))
        return losses

    def penalty(self) -> Tensor | None:
        """Return the penalty of the objective beneath: it reads no data, so no canary is in it."""
        return self.inner.penalty()

    def _linear(self, numbers: np.ndarray, rows: np.ndarray, size: int) -> Tensor:
        factors = learning_factors(self.module)
        entries = self.canaries.entries(factors)
        weights = self.length * ENTRY * entries.signs[numbers] * self.canaries.included[numbers]
        places = entries.places[numbers].T.ravel()
        both = np.concatenate([rows, rows]), np.concatenate([weights, -weights])
        values: list[Tensor] = []
        begin = 0
        for name in sorted(factors):
            width = factors[name].numel()
            here = (begin <= places) & (places < begin + width)
            i, j = np.unravel_index(places[here] - begin, factors[name].shape)
            copy = _as_used(self.module, name)
            row, weight = (_index(part[here], copy) for part in both)
            where = _index(i, copy), _index(j, copy)
            own = copy[(row, *where)] if copy.dim() == 3 else copy[where]
            values.append(torch.zeros(size, device=copy.device).index_add(0, row, weight * own))
            begin += width
        return torch.stack(values).sum(dim=0)


def _index(values: Sequence[int] | np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, device=like.device)


def _as_used(module: nn.Module, name: str) -> Tensor:
    """Return a factor as the layer works with it: once for every example, or once for all."""
    layer_name, _, factor = name.rpartition(".")
    layer = lora_layers(module)[layer_name]
    copies: tuple[Tensor, Tensor] | None = getattr(layer, "copies", None)
    if copies is not None:
        return copies[0] if factor == "lora_A" else copies[1]
    weight: Tensor = getattr(layer, factor)[CURRENT].weight
    return weight


@contextmanager
def _copies_of(module: nn.Module, rows: Sequence[int]) -> Iterator[None]:
    """Within the block layers work with the copies of these examples of the pass alone."""
    layers = [layer for layer in lora_layers(module).values() if getattr(layer, "copies", None)]
    before = [layer.copies for layer in layers]
    for layer, both in zip(layers, before, strict=True):
        layer.copies = tuple(
            copy[_index(rows, copy)] if copy.requires_grad else copy[: len(rows)] for copy in both
        )
    try:
        yield
    finally:
        for layer, both in zip(layers, before, strict=True):
            layer.copies = both
