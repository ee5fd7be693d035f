"""A round in which one factor is common to all clients: the mean of the other is exact.

``sum_i p_i s B_i A = s (sum_i p_i B_i) A``, and the same with ``B`` common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from deal_core.aggregation.rule import LORA_B, Aggregate, ClientUpdate, check_update
from deal_core.aggregation.running import FactorMean
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference

Finish = Callable[[Adapter], Adapter]
"""From the exact mean adapter (trained factor in float64) to the next current adapter."""


class OneFactorRound:
    """Running mean of the trained factor: constant memory, a pass over the bytes per client.

    The ideal update is known exactly from the float64 sum, so the error needs no sketch.

    Args:
        before: what the round started from; its other factor is common to all.
        factor: ``lora_A`` or ``lora_B``: the one that is trained.
        finish: what the rule makes of the mean.
    """

    def __init__(self, before: Adapter, factor: str, finish: Finish) -> None:
        self._before, self._factor, self._finish = before, factor, finish
        self._mean = FactorMean()

    def add(self, update: ClientUpdate) -> None:
        """See :class:`~deal_core.aggregation.rule.Aggregation`."""
        check_update(update, self._before, frozenset({self._factor}), mixed_ranks=False)
        factors = [update.adapter.layers[name] for name in self._before.layers]
        trained = [f.B if self._factor == LORA_B else f.A for f in factors]
        self._mean.add(trained, update.weight)

    def finish(self) -> Aggregate:
        """See :class:`~deal_core.aggregation.rule.Aggregation`."""
        ideal = self._replaced(dict(zip(self._before.layers, self._mean.mean(), strict=True)))
        current = self._finish(ideal)
        return Aggregate(current, None, relative_difference(current, ideal), 0.0)

    def _replaced(self, mean: Mapping[str, Tensor]) -> Adapter:
        on_b = self._factor == LORA_B
        layers = {
            name: LoraFactors(start.A, mean[name]) if on_b else LoraFactors(mean[name], start.B)
            for name, start in self._before.layers.items()
        }
        return Adapter(layers, self._before.scaling)


def rounded(adapter: Adapter) -> Adapter:
    """Return the adapter in float32."""
    layers = {
        name: LoraFactors(factors.A.float(), factors.B.float())
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)
