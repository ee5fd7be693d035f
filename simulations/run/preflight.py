"""Every error in the input shows before anything starts."""

from __future__ import annotations

from client.egress import LARGEST_SUM
from deal_core.aggregation import AGGREGATION_RULES, RULES_OF_KINDS, make_rule
from deal_core.config.experiment import AggregationConfig, Experiment
from deal_core.data import load_for_clients, open_source, partition
from deal_core.data.public import read_public
from deal_core.errors import UserError, choose
from deal_core.lora.kinds import kind_of
from deal_core.methods import (
    RULES,
    Statistics,
    every_task_ends_a_stage,
    method_of,
    statistics_of,
    texts_at_once,
)
from deal_core.models import (
    check_label_tokens,
    decodes_apart,
    embedding_size,
    has_label_logits,
    max_positions,
)
from deal_core.models.prompt import read_template
from deal_core.privacy.policy import at_server
from deal_core.wire.adapter_record import EXACT
from deal_core.wire.instruction import LEARN
from deal_core.wire.sums import largest_array
from server.plan import make_plan
from server.tracking.tracker import check_tracker
from simulations.check.finding import Check, reading, run_checks
from simulations.check.quick import QUICK, ROWS
from simulations.engines.faults import FAULTS
from simulations.run.name_checks import (
    check_mechanism,
    check_method,
    check_model,
    check_model_names,
    check_wire,
)
from simulations.run.room_check import check_room
from simulations.run.secure_preflight import check_secure
from simulations.run.text_lengths import check_text_lengths


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
            "ranks; use flexlora, flexlora-truncated or flora"
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
    has vectors of label names; a core needs labels in every task.

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
    if method.name != "deal" or not method.retention.enabled or method.warm_start_rank:
        raise UserError(
            f"{where} lays out every task anew; set method.name to deal, method.retention.enabled "
            "to true and method.warm_start_rank to 0"
        )
    core = kind_of(adapter).core
    if core and (adapter.rank % 2 or adapter.client_ranks):
        raise UserError(
            f"{where} learns a core of half the rank; set adapter.rank to an even number, and "
            "leave out adapter.client_ranks"
        )
    if core and experiment.train.step != "server":
        _check_core_at_clients(experiment)
    if core and method.consolidation.data not in {"auto", "none"}:
        raise UserError(
            f"{where} has frozen factors, and rounds of consolidation train a whole adapter; set "
            'method.consolidation.data to "none"'
        )
    texts = experiment.data.generation
    if core and texts:
        raise UserError(
            f"{where} takes its directions from the names of labels, and answers of task "
            f"'{texts[0]}' are texts; leave the task out, or set adapter.kind to lora and "
            "aggregation.rule to ffa"
        )
    if not core and (adapter.target_modules or adapter.first_layer or adapter.client_ranks):
        raise UserError(
            f"{where} has its own place and one rank; leave out adapter.target_modules, "
            "first_layer and client_ranks"
        )


def _check_core_at_clients(experiment: Experiment) -> None:
    """Noise, rounding, masks and medians are of whole factors: they would leave a core's frame."""
    aggregation = experiment.aggregation
    whole = {
        "privacy.mechanism": experiment.privacy.mechanism != "none",
        "wire.dtype": experiment.wire.dtype != EXACT,
        "aggregation.secure": aggregation.secure,
        "aggregation.robust": aggregation.robust != "none",
    }
    named = ", ".join(key for key, wrong in whole.items() if wrong)
    if named:
        raise UserError(
            f"adapter.kind 'core' does not go with {named} in steps at the clients, which change "
            "whole factors; set train.step to server, or leave them out"
        )


def _require_small_sums(experiment: Experiment, statistics: Statistics) -> None:
    """Check that sites will let the sums of a task leave. In a secure sum they are masked numbers.

    Raises:
        UserError: embeddings of so many entries that the sums are too large.
    """
    size = embedding_size(experiment.model, statistics.layers)
    if experiment.aggregation.secure:
        return
    form = statistics.at(experiment.wire.dtype)
    largest = largest_array(form.shapes(1, size), form.codes)
    if largest > LARGEST_SUM:
        raise UserError(
            f"method.name '{experiment.method.name}' adds up embeddings of {size} entries, and an "
            f"array of {largest / 2**20:.0f} MiB is more than leaves a site at once "
            f"({LARGEST_SUM / 2**20:.0f}); lower method.prototype.layers, set wire.dtype to "
            '"int8", or method.prototype.enabled to "off"'
        )


def check_statistics(experiment: Experiment) -> None:
    """A method whose clients send sums needs embeddings, and sums of which each client is in once.

    Raises:
        UserError: a model, a robust step or a schedule that it does not go with.
    """
    method = method_of(experiment)
    statistics = statistics_of(method)
    if statistics is None:
        return
    name, robust = experiment.method.name, experiment.aggregation.robust
    if at_server(experiment) and not has_label_logits(experiment.model):
        raise UserError(
            f"train.step = \"server\" and method.name '{name}': sums with noise are for "
            f"encoders, and model.family is '{experiment.model.family}'; use encoder-labels"
        )
    _require_small_sums(experiment, statistics)
    if text := texts_at_once(experiment):
        raise UserError(
            f"method.name '{name}' adds up sums by label, all tasks at once in this schedule, and "
            f"answers of '{text}' are texts; choose another schedule or set "
            'method.prototype.enabled to "off"'
        )
    if robust != "none":
        raise UserError(
            f"aggregation.robust '{robust}' judges adapters, and method.name '{name}' adds up "
            "sums; set it to none"
        )
    sums = [each for each in method.phases if each.statistics is not None]
    gradients = any(not each.statistics.once for each in sums if each.statistics is not None)
    if gradients and experiment.stream.schedule == "per-client":
        raise UserError(
            f"method.name '{name}' needs all clients of a task in one stage; set stream.schedule "
            'to "synchronous", or choose another method'
        )
    if any(each.name != LEARN for each in sums) and not every_task_ends_a_stage(experiment):
        raise UserError(
            f"method.name '{name}' takes sums where a stage ends, and a client may begin and end a "
            "task within one; set stream.consolidate_every to federation.rounds or less, or "
            'method.prototype.enabled to "off"'
        )


def check_answers(experiment: Experiment) -> None:
    """An answer that is a text needs a model that writes.

    Raises:
        UserError: it has another, ``model.template`` has no place for a text, or public texts are
            to be answered.
    """
    model, texts = experiment.model, experiment.data.generation
    if texts and has_label_logits(model):
        raise UserError(
            f"data.generation: answers of '{texts[0]}' are texts, and model.family "
            f"'{model.family}' chooses among labels; use causal-lm or seq2seq-lm"
        )
    if texts and experiment.method.consolidation.data == "public":
        raise UserError(
            'method.consolidation.data = "public" asks about labels, and answers of '
            f"'{texts[0]}' are texts; set it to none or private"
        )
    try:
        read_template(model.template)
    except ValueError as error:
        raise UserError(f"model.template: {error}") from None


def check_lengths(experiment: Experiment) -> None:
    """A text, and an answer that is written below it, fit into the model.

    Raises:
        UserError: they do not.
    """
    text = experiment.train.max_length
    answer = 0 if has_label_logits(experiment.model) else experiment.model.max_new_tokens
    positions = max_positions(experiment.model)
    apart = decodes_apart(experiment.model)
    if 0 < positions < (max(text, answer) if apart else text + answer):
        written = f" and model.max_new_tokens = {answer}" if answer else ""
        raise UserError(
            f"train.max_length = {text}{written}: the model reads {positions} tokens; "
            "lower train.max_length"
        )


def check_faults(experiment: Experiment) -> None:
    """Misbehaving clients exist in the engine ``inprocess`` alone.

    Raises:
        UserError: unknown kind, or another engine.
    """
    choose("faults.kind", experiment.faults.kind, FAULTS)
    if experiment.faults.clients and experiment.run.engine != "inprocess":
        raise UserError(
            "faults.clients: only the engine 'inprocess' has misbehaving clients; leave them out, "
            "or use --engine inprocess"
        )


def check_public(experiment: Experiment) -> None:
    """Read the public texts, where a phase of the method asks for some.

    Raises:
        UserError: see :func:`deal_core.data.public.read_public`.
    """
    for phase in method_of(experiment).phases:
        if phase.public_path:
            read_public(phase.public_path, experiment.data)


def check_data(experiment: Experiment) -> None:
    """Plan who works on which task, read every task as the clients do and divide it among them.

    Raises:
        UserError: see :mod:`deal_core.data` and :func:`server.plan.make_plan`; or a task has no
            test example, and nothing could be said of its accuracy.
    """
    source = open_source(experiment.data, experiment.privacy.unit_column)
    clients = [str(number) for number in range(experiment.federation.clients)]
    make_plan(experiment, source.task_names(), clients)
    for name in source.task_names():
        task = load_for_clients(experiment, name)
        check_label_tokens(experiment.model, task.labels)
        partition(
            task,
            experiment.data.partition,
            experiment.federation.clients,
            experiment.run.seed,
        )
        if not task.test:
            problem = "no test row; add some, or leave the task out"
            if task.held_out:
                share = f"data.split = {experiment.data.split:g}"
                problem = f"{share} leaves no test row; raise it, or add a test file"
            raise UserError(f"task '{name}': {problem}")


TABLES = tuple(Experiment.model_fields)
MODEL, METHOD = "the model's names", "the method's name"
SHAPES = "the model's layers"
OWN_ANSWERS = frozenset({"medmcqa", "embedded", "hub"})
"""Sources that know the labels of their tasks."""


def check_declared(experiment: Experiment) -> None:
    """Check that labels and tasks of texts are declared where a source asks for them: else heads
    would be of labels in one order, and scores of labels in another.

    Raises:
        UserError: they are declared where nobody reads them, or twice.
    """
    data = experiment.data
    if data.labels and data.source in OWN_ANSWERS:
        raise UserError(
            f'data.labels: with data.source = "{data.source}" a task has the labels of its data; '
            "leave it out, it is for files and sites"
        )
    if data.generation and data.source == "medmcqa":
        raise UserError(
            'data.generation: answers are labels with data.source = "medmcqa"; leave it out'
        )
    if data.path and data.source in OWN_ANSWERS:
        raise UserError(
            f'data.path = "{data.path}" is read with data.source = "files", and the source is '
            f'"{data.source}", which has its own data; set data.source, or leave data.path out'
        )
    known = data.tasks or tuple(data.measures)
    chosen = [task for task in data.measures if task in known and task not in data.generation]
    if chosen:
        raise UserError(
            f"data.measures.{chosen[0]}: its answers are labels, which are counted; leave it out, "
            "or name the task in data.generation"
        )
    both = [task for task in data.generation if data.labels.get(task)]
    if both:
        raise UserError(
            f"task '{both[0]}' is in data.labels and in data.generation; leave it out of one"
        )


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
    Check(check_public, reading("method", "data", METHOD)),
    Check(check_model, reading("model", "adapter", MODEL), settles=SHAPES),
    Check(check_room, reading(*TABLES, METHOD, ROWS, SHAPES)),
    Check(check_text_lengths, reading("train", "model", "data", ROWS, MODEL)),
)
"""All that needs torch, after the quick ones."""
