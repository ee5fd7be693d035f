"""FedIT: the mean of each factor, the baseline of the field, inexact."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.aggregation.aggregation_error import ErrorMeter
from deal_core.aggregation.rule import (
    BOTH,
    Aggregate,
    Aggregation,
    ClientUpdate,
    check_update,
)
from deal_core.aggregation.running import FactorMean
from deal_core.lora.adapter import Adapter, LoraFactors


@dataclass(frozen=True)
class FedIt:
    """``A = sum_i p_i A_i``, ``B = sum_i p_i B_i``: FedAvg on the LoRA parameters.

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
        return _Round(before)


class _Round:
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
        return Aggregate(current, None, reading.error, 0.0, reading.estimated)


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
        layers = {n: LoraFactors(f.A.float(), f.B.float()) for n, f in self.exact().items()}
        return Adapter(layers, self._scaling)
