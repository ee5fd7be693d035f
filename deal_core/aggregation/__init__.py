"""How client updates become one adapter: the rules, and the robust steps before them.

A rule is a file and a line here::

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
from functools import partial

from deal_core.aggregation.alternating import Alternating
from deal_core.aggregation.cosine_norm import cosine_norm
from deal_core.aggregation.fedex import FedEx
from deal_core.aggregation.fedit import FedIt
from deal_core.aggregation.fedsvd import FedSvd
from deal_core.aggregation.ffa import Ffa
from deal_core.aggregation.finite import NUMERICAL, finished, one_line, require_finite
from deal_core.aggregation.flexlora import FlexLora
from deal_core.aggregation.flora import Flora
from deal_core.aggregation.krum import multi_krum
from deal_core.aggregation.norm_bound import change_norms, refuse_beyond, shortened
from deal_core.aggregation.robust import RobustRule, median, trimmed_mean
from deal_core.aggregation.rule import (
    BOTH,
    LORA_A,
    LORA_B,
    Aggregate,
    Aggregation,
    AggregationFailed,
    AggregationRule,
    ClientUpdate,
    TooFewUpdates,
)
from deal_core.aggregation.screen import UNLIMITED, Limits, Screen, Verdict
from deal_core.aggregation.split import starting_adapter
from deal_core.config.experiment import AggregationConfig
from deal_core.errors import choose

__all__ = [
    "AGGREGATION_RULES",
    "BOTH",
    "LAID_OUT_ANEW",
    "LORA_A",
    "LORA_B",
    "MEANS_OF_FACTORS",
    "NUMERICAL",
    "ROBUST_RULES",
    "UNLIMITED",
    "Aggregate",
    "Aggregation",
    "AggregationFailed",
    "AggregationRule",
    "ClientUpdate",
    "Limits",
    "Screen",
    "TooFewUpdates",
    "Verdict",
    "change_norms",
    "finished",
    "make_rule",
    "one_line",
    "refuse_beyond",
    "require_finite",
    "shortened",
    "starting_adapter",
]

AGGREGATION_RULES: dict[str, Callable[[AggregationConfig], AggregationRule]] = {
    "fedit": lambda config: FedIt(),
    "ffa": lambda config: Ffa(),
    "alternating": lambda config: Alternating(),
    "fedsvd": lambda config: FedSvd(),
    "flora": lambda config: Flora(config.rank_cap),
    "fedex": lambda config: FedEx(config.rank_cap),
    "flexlora": lambda config: FlexLora(config.rank_cap),
    "flexlora-truncated": lambda config: FlexLora(keep_tail=False),
}
"""Name to rule. Inexact: ``fedit``, ``flexlora-truncated``, and any with a rank cap."""

MEANS_OF_FACTORS = frozenset({"fedit", "ffa", "ffa-a", "alternating", "fedsvd"})
"""Rules that need the mean of each factor and no single update, so a sum is enough; and after which
a task has learnt ``adapter.rank`` directions and no more."""

LAID_OUT_ANEW = frozenset({"flexlora", "flexlora-truncated"})
"""Rules after which both factors are others: what a format lost of the old ones fits no more."""

RULES_OF_KINDS: dict[str, Callable[[AggregationConfig], AggregationRule]] = {
    "ffa-a": lambda config: Ffa(LORA_A),
}
"""Name to rule of kinds of adapter that have one of their own (``adapter.kind``)."""

Robust = Callable[[AggregationConfig, AggregationRule, frozenset[str]], AggregationRule]

ROBUST_RULES: dict[str, Robust] = {
    "none": lambda config, base, distrusted: base,
    "median": lambda config, base, distrusted: RobustRule(base, median),
    "trimmed-mean": lambda config, base, distrusted: RobustRule(
        base, partial(trimmed_mean, fraction=config.trim_fraction)
    ),
    "multi-krum": lambda config, base, distrusted: RobustRule(
        base, partial(multi_krum, num_malicious=config.num_malicious), any_rank=True
    ),
    "cosine-norm": lambda config, base, distrusted: RobustRule(
        base, cosine_norm, any_rank=True, distrusted=distrusted
    ),
}
"""Name to what wraps a rule."""


def make_rule(
    config: AggregationConfig, distrusted: frozenset[str] = frozenset()
) -> AggregationRule:
    """Return the rule an experiment asks for, inside its robust step if it asks for one.

    Args:
        config: of the experiment.
        distrusted: clients that were left out when a robust step last judged them.

    Raises:
        UserError: an unknown ``rule`` or ``robust``; the message lists the known ones.
    """
    known = AGGREGATION_RULES if config.rule not in RULES_OF_KINDS else RULES_OF_KINDS
    rule = choose("aggregation rule", config.rule, known)(config)
    return choose("robust rule", config.robust, ROBUST_RULES)(config, rule, distrusted)
