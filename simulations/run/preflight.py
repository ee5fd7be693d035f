"""What is checked before anything starts: names, rules, sums, room and data, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from client.gate import Asked, require
from deal_core.aggregation import AGGREGATION_RULES, MEANS_OF_FACTORS, RULES_OF_KINDS, make_rule
from deal_core.config.experiment import AggregationConfig, Experiment
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, row_basis, zero_adapter
from deal_core.lora.kinds import kind_of, rule_of
from deal_core.lora.state import State
from deal_core.methods import FEWEST_IN_SUM, RULES, Method, method_of, statistics_of, texts_at_once
from deal_core.models import (
    adapter_shapes,
    check_bits,
    check_weights,
    has_label_logits,
    max_positions,
)
from deal_core.protection import check_counts, make_mechanism
from deal_core.randomness import seeded
from deal_core.secure_sum.terms import LEAST_SITES
from deal_core.wire.adapter_record import codec_named
from server.plan import make_plan
from server.tracking import check_tracker
from simulations.run.data_checks import (
    check_answers,
    check_data,
    check_declared,
    check_lengths,
    check_text_lengths,
)
from simulations.run.findings import Check, reading, run_checks
from simulations.run.rows import QUICK, ROWS


def check_method(experiment: Experiment) -> None:
    """Look the method up.

    Raises:
        UserError: unknown name.
    """
    method_of(experiment)


def check_model_names(experiment: Experiment) -> None:
    """Look up family and kind of adapter, and read the model's description.

    Raises:
        UserError: unknown name, a model that is nowhere, or a package that is missing.
    """
    check_bits(experiment.model)
    has_label_logits(experiment.model)
    kind_of(experiment.adapter)
    max_positions(experiment.model)


def check_wire(experiment: Experiment) -> None:
    """Look up how adapters travel.

    Raises:
        UserError: unknown ``wire.dtype``.
    """
    codec_named(experiment.wire.dtype)


def check_mechanism(experiment: Experiment) -> None:
    """Build the mechanism, which checks what goes with it.

    Raises:
        UserError: unknown mechanism, or keys that do not go with it.
    """
    make_mechanism(experiment)
    check_counts(experiment)


def check_model(experiment: Experiment) -> None:
    """Build the model without weights, and see whether its checkpoint has them all.

    Raises:
        UserError: layers, or weights, that it lacks.
    """
    adapter_shapes(experiment.model, experiment.adapter)
    check_weights(experiment.model)


def check_aggregation(experiment: Experiment) -> None:
    """Build the rule; clients of their own ranks need one that can mix them, and a method may
    need one that it can work with.

    Raises:
        UserError: unknown names, or ranks or a rule that do not go with the others.
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
    """Check that sums over records can leave under masks, and that each client is in one once.

    Raises:
        UserError: too few clients, or a schedule that it does not go with.
    """
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


Shapes = Mapping[str, tuple[int, int]]


def check_room(experiment: Experiment) -> None:
    """Let the method lay out all stages of the stream in the narrowest layer, on factors that are
    drawn instead of learnt, where they could take more directions than it has inputs.

    Args:
        experiment: its data can be read.

    Raises:
        UserError: a stage finds no room.
    """
    clients = [str(number) for number in range(experiment.federation.clients)]
    tasks = open_source(experiment.data, experiment.privacy.unit_column).task_names()
    stages = len(make_plan(experiment, tasks, clients).stages)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    name, (_, d_in) = min(shapes.items(), key=lambda each: each[1][1])
    if experiment.adapter.rank * stages > d_in:
        _lay_out(method_of(experiment), stages, {name: shapes[name]})


def _lay_out(method: Method, stages: int, shapes: Shapes) -> None:
    """Begin and end so many stages, or as many as take more directions."""
    generator, taken = seeded("room"), -1
    state = State(zero_adapter(shapes, 1), zero_adapter(shapes, 1))
    for _ in range(stages):
        begun = method.begin_task(state, generator)
        state = method.end_task(replace(begun, current=_drawn(begun.current, generator)))
        rows = next(iter(state.retained.layers.values())).A
        before, taken = taken, len(row_basis(rows))
        if taken == before:
            return


def _drawn(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """Return an adapter of the same rows ``A``, whose ``B`` has learnt something."""
    layers = {
        name: LoraFactors(f.A, torch.randn(f.B.shape, generator=generator))
        for name, f in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)


COUNTED = {"clients", "sites"}
"""Keys that say how many clients there are."""


def check_secure(experiment: Experiment) -> None:
    """A secure sum shows no single update, so nothing may be done that needs one.

    Raises:
        UserError: something does.
    """
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
    if any(experiment.faults.values()):
        raise UserError(
            "faults: what leaves under aggregation.secure is masked, and cannot be spoilt "
            "on its way; leave them out, or set aggregation.secure to false"
        )
    check_cohort(experiment)


def check_cohort(experiment: Experiment) -> None:
    """A sum hides nothing among too few, or where too many of them work together. How many sites
    will take part may not be known yet: then it is checked when a run is submitted.

    Raises:
        UserError: it is among too few, or too many may.
    """
    federation = experiment.federation
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


def preflight(experiment: Experiment) -> None:
    """Look up every name, read and divide every task once, build the model without weights, and see
    whether its checkpoint has them all.

    Raises:
        UserError: all that is wrong, a line each with the place and the cure.
    """
    found = run_checks((*QUICK, *CHECKS), experiment)
    if errors := [finding.text for finding in found if finding.kind == "error"]:
        raise UserError(*errors)


def check_names(experiment: Experiment) -> None:
    """Look up every name, and check what must go together; cheap.

    Raises:
        UserError: one line with the place and the cure.
    """
    for check in NAMES:
        check.find(experiment)


def check_faults(experiment: Experiment) -> None:
    """Misbehaving clients exist in the engine ``inprocess`` alone.

    Raises:
        UserError: another engine.
    """
    if any(experiment.faults.values()) and experiment.run.engine != "inprocess":
        raise UserError(
            "faults: only the engine 'inprocess' has misbehaving clients; leave them out, "
            "or use --engine inprocess"
        )


TABLES = tuple(Experiment.model_fields)
MODEL, METHOD = "the model's names", "the method's name"
SHAPES = "the model's layers"


NAMES = (
    Check(check_declared, reading("data")),
    Check(check_method, reading("method"), settles=METHOD),
    Check(check_model_names, reading("model", "adapter"), settles=MODEL),
    Check(check_aggregation, reading("aggregation", "method", "adapter")),
    Check(check_adapter_kind, reading("adapter", "method", "model", MODEL)),
    Check(check_secure, reading(*TABLES, METHOD, MODEL)),
    Check(check_wire, reading("wire")),
    Check(check_mechanism, reading(*TABLES, METHOD, MODEL)),
    Check(check_statistics, reading(*TABLES, METHOD, MODEL)),
    Check(check_answers, reading("model", "data", "method", MODEL)),
    Check(check_lengths, reading("train", "model", MODEL)),
    Check(check_faults, reading("faults", "run")),
    Check(check_tracker, reading("run")),
)
"""Names, and what must go together."""
CHECKS = (
    *NAMES,
    Check(
        check_data, reading("data", "stream", "federation", "run", "privacy", "model", ROWS, MODEL)
    ),
    Check(check_model, reading("model", "adapter", MODEL), settles=SHAPES),
    Check(check_room, reading(*TABLES, METHOD, ROWS, SHAPES)),
    Check(check_text_lengths, reading("train", "model", "data", ROWS, MODEL)),
)
"""All that needs torch, after the quick ones."""
