"""The aggregation rules: means of factors (FedIT, FFA-LoRA), sums of products (FLoRA, of clients
of any rank; FedEx-LoRA).

A rule is a line in :data:`AGGREGATION_RULES`::

    rule = make_rule(config)
    factors = rule.trained                      # what clients train and send
    aggregation = rule.begin(before)
    for update in updates:
        aggregation.add(update)
    result = finished(aggregation)              # current, residual, error
"""

from collections.abc import Callable, Mapping

import torch

from deal_core.aggregation.rule import (
    BOTH,
    LORA_A,
    LORA_B,
    Aggregate,
    ClientUpdate,
    Rule,
    check_update,
)
from deal_core.aggregation.running import ErrorMeter, FactorMean, ProductSum
from deal_core.aggregation.screen import cosine_norm
from deal_core.config.experiment import AggregationConfig
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter, LoraFactors, Spectrum, refactor, relative_difference


class _FedIt:
    """``A = sum_i p_i A_i``, ``B = sum_i p_i B_i``: FedAvg on the LoRA parameters, the baseline of
    the field.

    The error is the covariance of the drifts,
    ``sum_i p_i B_i A_i - B A = sum_i p_i (B_i - B)(A_i - A)``, of rank up to ``(K - 1) r``: zero
    for equal clients, growing with local steps, learning rate and heterogeneity. Linear, in
    constant memory. Source: docs/method.md (M25); Zhang et al., ICASSP 2024 (Shepherd).
    """

    def __init__(self, before: Adapter) -> None:
        self._before, self._mean = before, FactorMean()
        self._error_meter = ErrorMeter(before.shapes)

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, BOTH)
        factors = [update.adapter.layers[name] for name in self._before.layers]
        self._mean.add([tensor for f in factors for tensor in (f.A, f.B)], update.weight)
        self._error_meter.add(update.adapter, update.weight)

    def means(self) -> Adapter:
        """Return the mean of each factor, float64."""
        means = iter(self._mean.mean())
        layers = {name: LoraFactors(next(means), next(means)) for name in self._before.layers}
        return Adapter(layers, self._before.scaling)

    def finish(self) -> Aggregate:
        current = rounded(self.means())
        return Aggregate(current, None, self._error_meter.read(current))


class _FedEx(_FedIt):
    """The same means, and ``residual = s sum_i p_i (B_i - B)(A_i - A)``: by the identity of
    :class:`_FedIt`, current and residual together are the clients' mean, exactly.

    The residual is the factor pair ``[sqrt(p_i)(B_i - B)]_i [sqrt(p_i)(A_i - A)]_i``,
    compressed to its numerical rank, at most ``min((K - 1) r, d_out, d_in)``. It is gathered
    in one pass, as ``sum_i p_i D_i E_i - D E`` with the drifts ``D_i = B_i - B_before`` and
    ``E_i = A_i - A_before`` and their means ``D, E``: the same matrix, without waiting for
    the mean.

    Memory: two float64 copies of one client, and the drifts in a
    :class:`~deal_core.aggregation.running.ProductSum`. Source: Singhal et al., ACL 2025,
    arXiv 2410.09432; here the residual is scaled, weighted and kept as LoRA factors, never
    added to a base weight.
    """

    def __init__(self, before: Adapter) -> None:
        super().__init__(before)
        self._products, self._weight = ProductSum(before.shapes), 0.0

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, BOTH)
        self._products.add(self._drift(update.adapter), update.weight)
        super().add(update)
        self._weight += update.weight

    def finish(self) -> Aggregate:
        means = self.means()
        self._products.add(self._drift(means), -self._weight)
        current, total = rounded(means), self._weight / self._before.scaling
        residual = residual_of(
            {name: self._products.spectrum(name, total) for name in self._before.layers}
        )
        return Aggregate(current, residual, self._error_meter.read(current, residual))

    def _drift(self, adapter: Adapter) -> dict[str, LoraFactors]:
        return {
            name: LoraFactors(
                adapter.layers[name].A.double() - start.A.double(),
                adapter.layers[name].B.double() - start.B.double(),
            )
            for name, start in self._before.layers.items()
        }


class _Flora:
    """``residual = [s_1 p_1 B_1, s_2 p_2 B_2, ...] [A_1; A_2; ...]``; ``current`` starts afresh.

    The whole aggregate goes to the residual, compressed to its numerical rank. The next
    ``current`` has the ``A`` the round started from and a zero ``B``, so it adds nothing and
    its momentum is lost each round: exact, but it learns more slowly than a warm start.
    Clients may have any rank and scaling. Source: Wang et al., NeurIPS 2024, arXiv 2409.05976.
    """

    def __init__(self, before: Adapter) -> None:
        self._before, self._weight = before, 0.0
        self._products = ProductSum(before.shapes)
        self._error_meter = ErrorMeter(before.shapes)

    def add(self, update: ClientUpdate) -> None:
        check_update(update, self._before, BOTH, mixed_ranks=True)
        self._products.add(update.adapter.layers, update.weight * update.adapter.scaling)
        self._error_meter.add(update.adapter, update.weight)
        self._weight += update.weight

    def finish(self) -> Aggregate:
        if self._weight == 0.0:
            raise ValueError("no client update to aggregate")
        start = self._before.layers
        residual = residual_of({n: self._products.spectrum(n, self._weight) for n in start})
        fresh = {n: LoraFactors(f.A, torch.zeros_like(f.B)) for n, f in start.items()}
        current = Adapter(fresh, self._before.scaling)
        return Aggregate(current, residual, self._error_meter.read(current, residual))


def rounded(adapter: Adapter) -> Adapter:
    """Return the adapter in float32."""
    layers = {n: LoraFactors(f.A.float(), f.B.float()) for n, f in adapter.layers.items()}
    return Adapter(layers, adapter.scaling)


class OneFactorRound:
    """``B = sum_i p_i B_i``, ``A`` unchanged: exact, linear, half the bytes; or the reverse.

    The other factor is common to all clients, so the mean is exact: ``sum_i p_i s B_i A =
    s (sum_i p_i B_i) A``, and the same with ``B`` common. The ideal update is known exactly from
    the float64 sum, and the error from it. What it costs is capacity: the update stays in
    the row space of the first ``A`` (the column space of ``B``). Constant memory, a pass over the
    bytes per client. Source: Sun et al., ICLR 2024, arXiv 2403.12313 (FFA-LoRA).

    ``factor`` is trained; ``finish``: from the exact mean adapter, whose trained factor is float64,
    to the next current one (a rule of one's own: docs/extending.md).
    """

    def __init__(
        self, before: Adapter, factor: str, finish: Callable[[Adapter], Adapter] = rounded
    ) -> None:
        self._before, self._factor, self._finish = before, factor, finish
        self._mean = FactorMean()

    def add(self, update: ClientUpdate) -> None:
        """See :class:`~deal_core.aggregation.rule.Aggregation`."""
        check_update(update, self._before, frozenset({self._factor}))
        factors = [update.adapter.layers[name] for name in self._before.layers]
        trained = [f.B if self._factor == LORA_B else f.A for f in factors]
        self._mean.add(trained, update.weight)

    def finish(self) -> Aggregate:
        """See :class:`~deal_core.aggregation.rule.Aggregation`."""
        on_b = self._factor == LORA_B
        layers = {
            name: LoraFactors(start.A, mean) if on_b else LoraFactors(mean, start.B)
            for (name, start), mean in zip(
                self._before.layers.items(), self._mean.mean(), strict=True
            )
        }
        ideal = Adapter(layers, self._before.scaling)
        current = self._finish(ideal)
        return Aggregate(current, None, relative_difference(current, ideal))


AGGREGATION_RULES: dict[str, Rule] = {
    "fedit": Rule(BOTH, _FedIt),
    "ffa": Rule(frozenset({LORA_B}), lambda before: OneFactorRound(before, LORA_B)),
    "flora": Rule(BOTH, _Flora, mixed_ranks=True),
    "fedex": Rule(BOTH, _FedEx),
}
"""``aggregation.rule`` to rule. Inexact: ``fedit``."""
RULES_OF_KINDS: dict[str, Rule] = {
    "ffa-a": Rule(frozenset({LORA_A}), lambda before: OneFactorRound(before, LORA_A))
}
"""Name to rule of kinds of adapter that have one of their own (``adapter.kind``)."""
MEANS_OF_FACTORS = frozenset({"fedit", "ffa", "ffa-a"})
"""Rules that need the mean of each factor and no single update, so a sum is enough; and after which
a task has learnt ``adapter.rank`` directions and no more."""


ROBUST_RULES: dict[str, Callable[[Rule, frozenset[str]], Rule]] = {
    "none": lambda base, distrusted: base,
    "cosine-norm": cosine_norm,
}
"""``aggregation.robust`` to what wraps a rule."""


def make_rule(config: AggregationConfig, distrusted: frozenset[str] = frozenset()) -> Rule:
    """Return the rule an experiment asks for, inside its robust step if it asks for one.

    Args:
        config: of the experiment.
        distrusted: clients that were left out when the robust step last judged them.

    Raises:
        UserError: an unknown ``rule`` or ``robust``; the message lists the known ones.
    """
    known = RULES_OF_KINDS if config.rule in RULES_OF_KINDS else AGGREGATION_RULES
    rule = choose("aggregation rule", config.rule, known, "aggregators")
    return choose("robust rule", config.robust, ROBUST_RULES)(rule, distrusted)


def residual_of(spectra: Mapping[str, Spectrum]) -> Adapter | None:
    """Return the given spectra as one adapter of scaling 1; None: there is nothing to add.

    Its rank is the largest numerical rank of a layer; layers with less are zero-padded.
    """
    rank = max(parts.S.numel() for parts in spectra.values())
    if rank == 0:
        return None
    return Adapter({name: refactor(parts, rank) for name, parts in spectra.items()})
