"""How client updates become one adapter: the rules, and the robust step before them.

A rule is a class and a line here::

    rule = make_rule(config)
    factors = rule.trained(server_round)        # what clients train and send
    aggregation = rule.begin(before, server_round)
    for update in updates:
        aggregation.add(update)
    result = finished(aggregation)              # current, residual, error, lost

Before them a :class:`~deal_core.aggregation.screen.Screen` judges who is let in.
"""

from __future__ import annotations

from collections.abc import Callable

from deal_core.aggregation.cosine_norm import CosineNorm
from deal_core.aggregation.means import FedIt, Ffa
from deal_core.aggregation.products import FedEx, Flora, starting_adapter
from deal_core.aggregation.rule import (
    BOTH,
    LORA_A,
    LORA_B,
    NUMERICAL,
    Aggregate,
    Aggregation,
    AggregationFailed,
    AggregationRule,
    ClientUpdate,
    finished,
    one_line,
    require_finite,
)
from deal_core.aggregation.screen import Limits, Screen, Verdict
from deal_core.config.experiment import AggregationConfig
from deal_core.errors import choose

__all__ = [
    "AGGREGATION_RULES",
    "BOTH",
    "LORA_A",
    "LORA_B",
    "MEANS_OF_FACTORS",
    "NUMERICAL",
    "ROBUST_RULES",
    "Aggregate",
    "Aggregation",
    "AggregationFailed",
    "AggregationRule",
    "ClientUpdate",
    "Limits",
    "Screen",
    "Verdict",
    "finished",
    "make_rule",
    "one_line",
    "require_finite",
    "starting_adapter",
]

AGGREGATION_RULES: dict[str, Callable[[AggregationConfig], AggregationRule]] = {
    "fedit": lambda config: FedIt(),
    "ffa": lambda config: Ffa(),
    "flora": lambda config: Flora(),
    "fedex": lambda config: FedEx(),
}
"""Name to rule. Inexact: ``fedit``, and any with a rank cap."""

MEANS_OF_FACTORS = frozenset({"fedit", "ffa", "ffa-a"})
"""Rules that need the mean of each factor and no single update, so a sum is enough; and after which
a task has learnt ``adapter.rank`` directions and no more."""

RULES_OF_KINDS: dict[str, Callable[[AggregationConfig], AggregationRule]] = {
    "ffa-a": lambda config: Ffa(LORA_A),
}
"""Name to rule of kinds of adapter that have one of their own (``adapter.kind``)."""

Robust = Callable[[AggregationRule, frozenset[str]], AggregationRule]

ROBUST_RULES: dict[str, Robust] = {
    "none": lambda base, distrusted: base,
    "cosine-norm": CosineNorm,
}
"""Name to what wraps a rule."""


def make_rule(
    config: AggregationConfig, distrusted: frozenset[str] = frozenset()
) -> AggregationRule:
    """Return the rule an experiment asks for, inside its robust step if it asks for one.

    Args:
        config: of the experiment.
        distrusted: clients that were left out when the robust step last judged them.

    Raises:
        UserError: an unknown ``rule`` or ``robust``; the message lists the known ones.
    """
    known = AGGREGATION_RULES if config.rule not in RULES_OF_KINDS else RULES_OF_KINDS
    rule = choose("aggregation rule", config.rule, known)(config)
    return choose("robust rule", config.robust, ROBUST_RULES)(rule, distrusted)
