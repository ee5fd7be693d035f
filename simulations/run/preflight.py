"""What is checked of an experiment before it starts: names, rules and sums, then data and model.
Every check raises a ``UserError`` with the place and the cure."""

from __future__ import annotations

from client.gate import Asked, require
from deal_core.aggregation.rules import (
    AGGREGATION_RULES,
    MEANS_OF_FACTORS,
    RULES_OF_KINDS,
    make_rule,
)
from deal_core.config.experiment import AggregationConfig, Experiment
from deal_core.deal.interface import statistics_of
from deal_core.errors import UserError
from deal_core.lora.kinds import kind_of, rule_of
from deal_core.methods import FEWEST_IN_SUM, RULES, method_of, texts_at_once
from deal_core.models import adapter_shapes, check_weights, has_label_logits, max_positions
from deal_core.models.loading import check_bits
from deal_core.protection import make_mechanism
from deal_core.secure_sum.terms import LEAST_SITES
from server.folder import check_tracker
from simulations.run.data_checks import (
    check_answers,
    check_data,
    check_declared,
    check_lengths,
    check_membership,
    check_text_lengths,
)
from simulations.run.quick_checks import Check, check_unit


def check_method(experiment: Experiment) -> None:
    """Look the method up; sites run what is installed there."""
    if experiment.plugins and experiment.data.source == "sites":
        raise UserError("plugins: a site runs what is installed there; leave plugins out")
    method_of(experiment)


def check_model_names(experiment: Experiment) -> None:
    """Look up family and kind of adapter, and read the model's description."""
    check_bits(experiment.model)
    has_label_logits(experiment.model)
    kind_of(experiment.adapter)
    max_positions(experiment.model)


def check_mechanism(experiment: Experiment) -> None:
    """Build the mechanism, which checks what goes with it."""
    make_mechanism(experiment)


def check_model(experiment: Experiment) -> None:
    """Build the model without weights, and see whether its checkpoint has them all."""
    adapter_shapes(experiment.model, experiment.adapter)
    check_weights(experiment.model)


def check_aggregation(experiment: Experiment) -> None:
    """Build the rule, which goes with the kind of adapter, the method, and the clients' ranks."""
    method, name = experiment.method.name, experiment.aggregation.rule
    kind, own_rule = experiment.adapter.kind, kind_of(experiment.adapter).rule
    if own_rule and name not in {own_rule, AggregationConfig().rule}:
        raise UserError(
            f"aggregation.rule '{name}': adapter.kind '{kind}' has a rule of its own; leave out "
            "aggregation.rule"
        )
    if name in RULES_OF_KINDS and name != own_rule:
        raise UserError(
            f"aggregation.rule '{name}' learns nothing with adapter.kind '{kind}', whose lora_B "
            f"begins at zero; use {', '.join(AGGREGATION_RULES)}"
        )
    rule = make_rule(experiment.aggregation)
    if name not in RULES.get(method, {name}):
        raise UserError(
            f"aggregation.rule '{name}' does not go with method.name '{method}'; "
            f"use {', '.join(sorted(RULES[method]))}"
        )
    own, rank = experiment.adapter.client_ranks, experiment.adapter.rank
    if own and not rule.mixed_ranks:
        raise UserError(
            f"adapter.client_ranks: aggregation.rule '{name}' cannot mix ranks; use flora"
        )
    if any(not 1 <= each <= rank for each in own):
        raise UserError(f"adapter.client_ranks: every rank must be from 1 to adapter.rank ({rank})")


def check_components(experiment: Experiment) -> None:
    """Components are kept of generative models, task by task."""
    if not experiment.method.retention.apart:
        return
    if experiment.method.name != "deal" or has_label_logits(experiment.model):
        raise UserError(
            "method.retention.apart keeps an adapter for each task of a generative model with "
            "method.name deal; leave it out"
        )
    if experiment.stream.at_once or experiment.stream.schedule == "per-client":
        raise UserError(
            "method.retention.apart needs one task at a time; set stream.schedule to synchronous"
        )


def check_adapter_kind(experiment: Experiment) -> None:
    """A kind of adapter that lays out every task anew goes with few methods, models and keys."""
    adapter, method = experiment.adapter, experiment.method
    if kind_of(adapter).begin_task is None:
        return
    where = f"adapter.kind '{adapter.kind}'"
    if adapter.kind == "pooled" and not has_label_logits(experiment.model):
        raise UserError(
            f"{where} needs vectors of label names, and model.family '{experiment.model.family}' "
            "has none; use encoder-labels, or adapter.kind lora"
        )
    if method.name != "deal" or method.retention.filter == "none":
        raise UserError(
            f"{where} lays out every task anew; set method.name to deal and "
            "method.retention.filter to svd"
        )
    if adapter.target_modules or adapter.first_layer:
        raise UserError(
            f"{where} has its own place; leave out adapter.target_modules and first_layer"
        )


def check_statistics(experiment: Experiment) -> None:
    """Sums over records leave under masks, and each client is in one once."""
    method, name = method_of(experiment), experiment.method.name
    statistics = statistics_of(method)
    if statistics is None:
        return
    federation = experiment.federation
    clients = len(federation.sites) or federation.clients
    known = experiment.data.source != "sites" or "clients" in federation.model_fields_set
    if clients < FEWEST_IN_SUM and (known or federation.sites):
        raise UserError(
            f"method.name '{name}' adds up records under masks, and of a sum over {clients} "
            f"clients each knows too much; let {FEWEST_IN_SUM} or more take part "
            '(federation.clients), or set method.prototype.enabled to "off" (deal)'
        )
    if text := texts_at_once(experiment):
        raise UserError(
            f"method.name '{name}' adds up sums by label, all tasks at once in this schedule, and "
            f"answers of '{text}' are texts; choose another schedule or set "
            'method.prototype.enabled to "off"'
        )
    sums = [each.statistics for each in method.phases if each.statistics is not None]
    if experiment.stream.schedule == "per-client" and not all(each.once for each in sums):
        raise UserError(
            f"method.name '{name}' needs all clients of a task in one stage; set stream.schedule "
            'to "synchronous", or choose another method'
        )


COUNTED = {"clients", "sites"}
"""Keys that say how many clients there are."""


def check_secure(experiment: Experiment) -> None:
    """A secure sum shows no single update, so nothing may be done that needs one."""
    config, name = experiment.aggregation, experiment.method.name
    if experiment.privacy.metrics == "summed" and not config.secure:
        raise UserError(
            'privacy.metrics = "summed": counts are added up before anybody sees them; set '
            "aggregation.secure to true"
        )
    if not config.secure:
        return
    rule = rule_of(experiment.adapter, config)
    if rule not in MEANS_OF_FACTORS:
        raise UserError(
            f"aggregation.secure: rule '{rule}' is no mean of factors; use "
            f"{', '.join(sorted(MEANS_OF_FACTORS))}"
        )
    if config.robust != "none":
        raise UserError(
            f"aggregation.secure: aggregation.robust '{config.robust}' judges single updates, and "
            "only their sum is seen; set it to none"
        )
    if experiment.wire.dtype != "float32":
        raise UserError("aggregation.secure has a format of its own; set wire.dtype to float32")
    per_client = experiment.stream.schedule == "per-client"
    if per_client and statistics_of(method_of(experiment)) is not None:
        raise UserError(
            f"aggregation.secure: a sum of method.name '{name}' is of one task, and clients work "
            'on others at a time; set stream.schedule to "synchronous"'
        )
    require(Asked(experiment), "sum")
    check_cohort(experiment)


def check_cohort(experiment: Experiment) -> None:
    """A sum hides nothing among too few, or where too many of them work together."""
    federation = experiment.federation
    # How many sites take part may not be known yet: then it is checked when a run is submitted.
    if experiment.data.source == "sites" and federation.model_fields_set.isdisjoint(COUNTED):
        return
    everybody = len(federation.sites) or federation.clients
    training = set(map(str, federation.participants or range(everybody)))
    late = {name for name, over in experiment.stream.joins.items() if over}
    clients = min(federation.clients_per_round or len(training), len(training - late))
    least, colluding = experiment.aggregation.min_cohort, experiment.privacy.colluding
    if clients < LEAST_SITES:
        raise UserError(
            f"aggregation.secure needs {LEAST_SITES} clients in a round: in a sum of two each "
            "knows the other's part; raise federation.clients"
        )
    if least > clients:
        raise UserError(
            f"aggregation.min_cohort is {least}, and a round has {clients} clients; lower it"
        )
    if colluding > clients - 2:
        raise UserError(
            f"privacy.colluding is {colluding}: of {clients} clients in a round, that leaves no "
            "two whose parts the sum could hide; lower it"
        )


NAMES: tuple[Check, ...] = (
    check_declared,
    check_method,
    check_model_names,
    check_aggregation,
    check_adapter_kind,
    check_components,
    check_secure,
    check_mechanism,
    check_statistics,
    check_answers,
    check_lengths,
    check_tracker,
)
"""Names, and what must go together."""
LONGER: tuple[Check, ...] = (
    check_unit,
    check_data,
    check_model,
    check_text_lengths,
    check_membership,
)
"""What takes longer, of an experiment in which nothing else is wrong."""


def check_names(experiment: Experiment) -> None:
    """Look up every name, and check what must go together; cheap.

    Raises:
        UserError: one line with the place and the cure.
    """
    for check in NAMES:
        check(experiment)
