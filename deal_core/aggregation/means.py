"""Rules that need the mean of each factor and no single update: FedIT and FFA-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from deal_core.aggregation.aggregation_error import ErrorMeter
from deal_core.aggregation.rule import (
    BOTH,
    LORA_B,
    Aggregate,
    Aggregation,
    ClientUpdate,
    check_update,
)
from deal_core.aggregation.running import FactorMean
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference

Finish = Callable[[Adapter], Adapter]
"""From the exact mean adapter (trained factor in float64) to the next current adapter."""


@dataclass(frozen=True)
class FedIt:
    """``A = sum_i p_i A_i``, ``B = sum_i p_i B_i``: FedAvg on the LoRA parameters, the baseline of
    the field.

    The error is the covariance of the drifts,
    ``sum_i p_i B_i A_i - B A = sum_i p_i (B_i - B)(A_i - A)``, of rank up to ``(K - 1) r``: zero
    for equal clients, growing with local steps, learning rate and heterogeneity. Linear, in
    constant memory. Source: docs/method.md (M25); Zhang et al., ICASSP 2024 (Shepherd).
    """

    @property
    def mixed_ranks(self) -> bool:
        """False: factors of different shapes have no mean."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return both factors in every round."""
        return BOTH

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return _BothRound(before)


class _BothRound:
    def __init__(self, before: Adapter) -> None:
        self._before = before
        self._means = BothMeans(before)
        self._error_meter = ErrorMeter(before.shapes)

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, BOTH, mixed_ranks=False)
        self._means.add(update)
        self._error_meter.add(update.adapter, update.weight)

    def finish(self) -> Aggregate:
        current = self._means.rounded()
        reading = self._error_meter.read(current)
        return Aggregate(current, None, reading.error, reading.estimated)


class BothMeans:
    """Running means of both factors of every layer, float64."""

    def __init__(self, before: Adapter) -> None:
        self._names, self._scaling = list(before.layers), before.scaling
        self._mean = FactorMean()

    def add(self, update: ClientUpdate) -> None:
        """Add one update to the sums."""
        layers = update.adapter.layers
        factors = [layers[name] for name in self._names]
        self._mean.add([tensor for f in factors for tensor in (f.A, f.B)], update.weight)

    def exact(self) -> dict[str, LoraFactors]:
        """Return the float64 means of every layer.

        Raises:
            ValueError: nothing was added.
        """
        means = iter(self._mean.mean())
        return {name: LoraFactors(next(means), next(means)) for name in self._names}

    def rounded(self) -> Adapter:
        """Return the means as a float32 adapter."""
        return rounded(Adapter(self.exact(), self._scaling))


@dataclass(frozen=True)
class Ffa:
    """``B = sum_i p_i B_i``, ``A`` unchanged: exact, linear, half the bytes; or the reverse.

    What it costs is capacity: the update stays in the row space of the first ``A`` (the column
    space of ``B``). Source: Sun et al., ICLR 2024, arXiv 2403.12313.

    Attributes:
        factor: what clients train, ``lora_B`` or ``lora_A``.
    """

    factor: str = LORA_B

    @property
    def mixed_ranks(self) -> bool:
        """False: one frozen factor for all."""
        return False

    def trained(self, server_round: int) -> frozenset[str]:
        """Return the one factor in every round."""
        return frozenset({self.factor})

    def begin(self, before: Adapter, server_round: int) -> Aggregation:
        """Start a round."""
        return OneFactorRound(before, self.factor)


def rounded(adapter: Adapter) -> Adapter:
    """Return the adapter in float32."""
    layers = {
        name: LoraFactors(factors.A.float(), factors.B.float())
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)


class OneFactorRound:
    """Running mean of the one trained factor: constant memory, a pass over the bytes per client.

    The other is common to all clients, so the mean is exact: ``sum_i p_i s B_i A =
    s (sum_i p_i B_i) A``, and the same with ``B`` common. The ideal update is known exactly from
    the float64 sum, so the error needs no sketch.

    Args:
        before: what the round started from; its other factor is common to all.
        factor: ``lora_A`` or ``lora_B``: the one that is trained.
        finish: what the rule makes of the mean.
    """

    def __init__(self, before: Adapter, factor: str, finish: Finish = rounded) -> None:
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
        return Aggregate(current, None, relative_difference(current, ideal))

    def _replaced(self, mean: Mapping[str, Tensor]) -> Adapter:
        on_b = self._factor == LORA_B
        layers = {
            name: LoraFactors(start.A, mean[name]) if on_b else LoraFactors(mean[name], start.B)
            for name, start in self._before.layers.items()
        }
        return Adapter(layers, self._before.scaling)
