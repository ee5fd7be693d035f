"""A round that sums products ``B_i A_i``: any rank, any scaling."""

from __future__ import annotations

from collections.abc import Callable

from deal_core.aggregation.aggregation_error import ErrorMeter
from deal_core.aggregation.rule import BOTH, Aggregate, ClientUpdate, check_update
from deal_core.aggregation.running import ProductSum
from deal_core.lora.adapter import Adapter, Spectrum


class ProductRound:
    """Gathers ``sum_i w_i s_i B_i A_i`` as factors; the rule decides what to make of it.

    Args:
        before: what the round started from; gives layers, next rank and scaling.
        finish: the rule's last step.
    """

    def __init__(self, before: Adapter, finish: Callable[[ProductRound], Aggregate]) -> None:
        self.before = before
        self._finish = finish
        self._products = ProductSum(before.shapes)
        self._error_meter = ErrorMeter(before.shapes)
        self._weight = 0.0

    def add(self, update: ClientUpdate) -> None:
        """See :class:`~deal_core.aggregation.rule.Aggregation`."""
        check_update(update, self.before, BOTH, mixed_ranks=True)
        self._products.add(update.adapter.layers, update.weight * update.adapter.scaling)
        self._error_meter.add(update.adapter, update.weight)
        self._weight += update.weight

    def finish(self) -> Aggregate:
        """Return what the rule makes of the sums.

        Raises:
            ValueError: no update was added.
        """
        if self._weight == 0.0:
            raise ValueError("no client update to aggregate")
        return self._finish(self)

    def spectra(self) -> dict[str, Spectrum]:
        """Return the thin SVD of the ideal update of every layer, to its numerical rank."""
        return {name: self._products.spectrum(name, self._weight) for name in self.before.layers}

    def measured(self, current: Adapter, residual: Adapter | None, cut: float) -> Aggregate:
        """Return the aggregate with its error; ``cut`` is the norm of what was left out."""
        reading = self._error_meter.read(current, residual)
        return Aggregate(current, residual, reading.error, reading.share(cut), reading.estimated)
