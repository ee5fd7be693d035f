"""How client updates become one adapter: the rules, and the robust step before them.

A rule is a line in :data:`AGGREGATION_RULES`::

    rule = make_rule(config)
    factors = rule.trained                      # what clients train and send
    aggregation = rule.begin(before)
    for update in updates:
        aggregation.add(update)
    result = finished(aggregation)              # current, residual, error, lost

Before them a :class:`~deal_core.aggregation.screen.Screen` judges who is let in.
"""

from __future__ import annotations

from collections.abc import Callable

from deal_core.aggregation.cosine_norm import cosine_norm
from deal_core.aggregation.rule import (
    BOTH,
    LORA_A,
    LORA_B,
    NUMERICAL,
    Aggregate,
    Aggregation,
    AggregationFailed,
    ClientUpdate,
    Rule,
    finished,
    one_line,
    require_finite,
)
from deal_core.aggregation.rules import (
    AGGREGATION_RULES,
    MEANS_OF_FACTORS,
    RULES_OF_KINDS,
    starting_adapter,
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
    "RULES_OF_KINDS",
    "Aggregate",
    "Aggregation",
    "AggregationFailed",
    "ClientUpdate",
    "Limits",
    "Rule",
    "Screen",
    "Verdict",
    "finished",
    "make_rule",
    "one_line",
    "require_finite",
    "starting_adapter",
]

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
    rule = choose("aggregation rule", config.rule, known)
    return choose("robust rule", config.robust, ROBUST_RULES)(rule, distrusted)
