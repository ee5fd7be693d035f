"""An aggregation rule, a kind of adapter and a method that go together."""

from __future__ import annotations

from deal_core.aggregation import AGGREGATION_RULES, RULES_OF_KINDS, make_rule
from deal_core.config.experiment import AggregationConfig, Experiment
from deal_core.errors import UserError
from deal_core.lora.kinds import kind_of
from deal_core.methods import RULES
from deal_core.models import has_label_logits


def check_aggregation(experiment: Experiment) -> None:
    """Build the rule; clients of their own ranks need one that can mix them, and a method may
    need one that it can work with.

    Raises:
        UserError: unknown names, or ranks that the rule or the adapter does not allow.
    """
    check_rule_of_kind(experiment)
    rule = make_rule(experiment.aggregation)
    method, name = experiment.method.name, experiment.aggregation.rule
    if name not in RULES.get(method, {name}):
        raise UserError(
            f"aggregation.rule '{name}' does not go with method.name '{method}'; "
            f"use {', '.join(sorted(RULES[method]))}"
        )
    own, rank = experiment.adapter.client_ranks, experiment.adapter.rank
    if own and not rule.mixed_ranks:
        raise UserError(
            f"adapter.client_ranks: aggregation.rule '{experiment.aggregation.rule}' cannot mix "
            "ranks; use flora"
        )
    if any(not 1 <= each <= rank for each in own):
        raise UserError(f"adapter.client_ranks: every rank must be from 1 to adapter.rank ({rank})")


def check_rule_of_kind(experiment: Experiment) -> None:
    """A kind of adapter may have a rule of its own, which goes with no other kind.

    Raises:
        UserError: ``aggregation.rule`` names another than the kind has, or one of another kind.
    """
    kind, name = experiment.adapter.kind, experiment.aggregation.rule
    own = kind_of(experiment.adapter).rule
    if own and name not in {own, AggregationConfig().rule}:
        raise UserError(
            f"aggregation.rule '{name}': adapter.kind '{kind}' has a rule of its own; leave out "
            "aggregation.rule"
        )
    if name in RULES_OF_KINDS and name != own:
        raise UserError(
            f"aggregation.rule '{name}' learns nothing with adapter.kind '{kind}', whose lora_B "
            f"begins at zero; use {', '.join(AGGREGATION_RULES)}"
        )


def check_adapter_kind(experiment: Experiment) -> None:
    """A kind of adapter that lays out every task anew needs a method that does, and a model that
    has vectors of label names.

    Raises:
        UserError: it has another, or other keys say where the adapter is.
    """
    adapter, method = experiment.adapter, experiment.method
    if kind_of(adapter).begin_task is None:
        return
    where = f"adapter.kind '{adapter.kind}'"
    if adapter.kind == "pooled" and not has_label_logits(experiment.model):
        raise UserError(
            f"{where} needs vectors of label names, and model.family '{experiment.model.family}' "
            "has none; use encoder-labels, or adapter.kind lora"
        )
    if method.name != "deal" or not method.retention.enabled:
        raise UserError(
            f"{where} lays out every task anew; set method.name to deal and "
            "method.retention.enabled to true"
        )
    if adapter.target_modules or adapter.first_layer or adapter.client_ranks:
        raise UserError(
            f"{where} has its own place and one rank; leave out adapter.target_modules, "
            "first_layer and client_ranks"
        )
