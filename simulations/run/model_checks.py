"""Checks of names, rules and sums, and of what must go together; torch is imported here. Each
raises a ``UserError`` with the place and the cure."""

from client.gate import Asked, require
from deal_core import models
from deal_core.aggregation import rules
from deal_core.config.data import ENTITY_F1
from deal_core.config.experiment import AggregationConfig, Experiment
from deal_core.data import open_source
from deal_core.deal.interface import statistics_of
from deal_core.errors import UserError
from deal_core.lora.kinds import kind_of, rule_of
from deal_core.methods import FEWEST_IN_SUM, RULES, method_of, texts_at_once
from deal_core.models.loading import best_device, check_bits
from deal_core.models.prompt import read_template
from deal_core.protection import make_mechanism
from deal_core.secure_sum.terms import LEAST_SITES
from server.folder import check_tracker
from simulations.run.quick_checks import Check

OWN_ANSWERS = frozenset({"medmcqa", "embedded", "hub"})
"""Sources that know the labels of their tasks."""


def check_declared(experiment: Experiment) -> None:
    """Labels and text-generation tasks are declared once, where a source asks for them."""
    # Else heads would be of labels in one order, and scores of labels in another.
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
    others = {task for task in data.measures if not data.tagged(task)}.difference(data.generation)
    chosen = [task for task in known if task in others]
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


def check_answers(experiment: Experiment) -> None:
    """A text-generation task needs a generative model, and every prompt a place for the text."""
    model, texts = experiment.model, experiment.data.generation
    if texts and models.has_label_logits(model):
        raise UserError(
            f"data.generation: answers of '{texts[0]}' are texts, and model.family "
            f"'{model.family}' chooses among labels; use causal-lm or seq2seq-lm"
        )
    if (text := texts_at_once(experiment)) and experiment.stream.schedule == "joint-all-labels":
        raise UserError(
            'stream.schedule = "joint-all-labels" learns among the labels of all tasks, and '
            f"answers of '{text}' are texts; set it to \"joint\""
        )
    where = "model.template"
    try:
        template = read_template(model.template)
        for task, instruction in experiment.data.instructions.items():
            where = f"data.instructions.{task}"
            template.around(instruction, ())
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check_tags(experiment: Experiment) -> None:
    """A model that tags words is for tasks whose words have tags, and such tasks are for it."""
    data, name = experiment.data, experiment.model.family
    tags = models.family_of(experiment.model).tags
    if not tags and not any(map(data.tagged, data.measures)):
        return
    others = [task for task in open_source(data).task_names() if data.tagged(task) != tags]
    if others or data.generation:
        raise UserError(
            f"model.family '{name}' {'tags' if tags else 'does not tag'} words; token-labels and "
            f'data.measures.TASK = "{ENTITY_F1}" of all tasks go together: see {", ".join(others)}'
        )
    sums = statistics_of(method_of(experiment)) is not None
    kinds = experiment.method.name, experiment.adapter.kind, experiment.stream.schedule, data.source
    if sums or not {"ewc", "pooled", "joint-all-labels", "hub"}.isdisjoint(kinds):
        raise UserError(
            f"model.family '{name}' tags words: leave out class sums (method.prototype.enabled, "
            "prototype, linear-probe), ewc, joint-all-labels, pooled and hub, which are of texts"
        )


def check_lengths(experiment: Experiment) -> None:
    """A text, and an answer that is written below it, fit into the model."""
    text = experiment.train.max_length
    answer = 0 if models.has_label_logits(experiment.model) else experiment.model.max_new_tokens
    positions = models.max_positions(experiment.model)
    apart = models.decodes_apart(experiment.model)
    if 0 < positions < (max(text, answer) if apart else text + answer):
        written = f" and model.max_new_tokens = {answer}" if answer else ""
        raise UserError(
            f"train.max_length = {text}{written}: the model reads {positions} tokens; "
            "lower train.max_length"
        )


def check_method(experiment: Experiment) -> None:
    """Look the method up; sites run what is installed there."""
    if experiment.plugins and experiment.data.source == "sites":
        raise UserError("plugins: a site runs what is installed there; leave plugins out")
    method_of(experiment)


def check_model_names(experiment: Experiment) -> None:
    """Look up family and kind of adapter, and read the model's description."""
    check_bits(experiment.model)
    models.has_label_logits(experiment.model)
    kind_of(experiment.adapter)
    models.max_positions(experiment.model)


def check_mechanism(experiment: Experiment) -> None:
    """Build the mechanism, which checks what goes with it."""
    make_mechanism(experiment)


def check_model(experiment: Experiment) -> None:
    """Build the model without weights, and see whether its checkpoint has them all."""
    models.adapter_shapes(experiment.model, experiment.adapter)
    models.check_weights(experiment.model)


def check_aggregation(experiment: Experiment) -> None:
    """Build the rule, which goes with the kind of adapter, the method and the clients' ranks."""
    method, name = experiment.method.name, experiment.aggregation.rule
    kind, own_rule = experiment.adapter.kind, kind_of(experiment.adapter).rule
    if own_rule and name not in {own_rule, AggregationConfig().rule}:
        raise UserError(
            f"aggregation.rule '{name}': adapter.kind '{kind}' has a rule of its own; leave out "
            "aggregation.rule"
        )
    if name in rules.RULES_OF_KINDS and name != own_rule:
        raise UserError(
            f"aggregation.rule '{name}' learns nothing with adapter.kind '{kind}', whose lora_B "
            f"begins at zero; use {', '.join(rules.AGGREGATION_RULES)}"
        )
    rule = rules.make_rule(experiment.aggregation)
    if name not in RULES.get(method, {name}):
        raise UserError(
            f"aggregation.rule '{name}' does not go with method.name '{method}'; "
            f"use {', '.join(sorted(RULES[method]))}"
        )
    own, rank = experiment.adapter.client_ranks, experiment.adapter.rank
    if own and (not rule.mixed_ranks or experiment.method.retention.apart):
        raise UserError(
            "adapter.client_ranks: every round of mixed ranks begins with a fresh adapter; set "
            "aggregation.rule to flora, and leave out method.retention.apart"
        )
    if any(not 1 <= each <= rank for each in own):
        raise UserError(f"adapter.client_ranks: every rank must be from 1 to adapter.rank ({rank})")


def check_components(experiment: Experiment) -> None:
    """Components are kept of generative models, task by task."""
    if not experiment.method.retention.apart:
        return
    if experiment.method.name != "deal" or models.has_label_logits(experiment.model):
        raise UserError(
            "method.retention.apart keeps an adapter for each task of a generative model with "
            "method.name deal; leave it out"
        )
    if experiment.stream.at_once or experiment.stream.consolidate_every:
        raise UserError(
            "method.retention.apart learns one task at a time; set stream.schedule to synchronous "
            "or per-client, and leave out stream.consolidate_every"
        )
    if experiment.method.retention.filter == "none":
        raise UserError(
            "method.retention.apart compresses what a task has learnt; set method.retention.filter "
            "to svd or wavelet"
        )


def check_adapter_kind(experiment: Experiment) -> None:
    """A kind of adapter that lays out every task anew goes with few methods, models and keys."""
    adapter, method = experiment.adapter, experiment.method
    if kind_of(adapter).begin_task is None:
        return
    where = f"adapter.kind '{adapter.kind}'"
    if adapter.kind == "pooled" and not models.has_label_logits(experiment.model):
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
    if rule not in rules.MEANS_OF_FACTORS:
        raise UserError(
            f"aggregation.secure: rule '{rule}' is no mean of factors; use "
            f"{', '.join(sorted(rules.MEANS_OF_FACTORS))}"
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


def check_device(experiment: Experiment) -> None:
    """The device is there."""
    asked = experiment.run.device
    if asked.startswith("cuda") and best_device().type != "cuda":
        raise UserError(f'run.device = "{asked}": torch sees no such GPU here; set "auto" or "cpu"')


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
    check_device,
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
    check_tags,
    check_lengths,
    check_tracker,
)
"""Names, and what must go together."""


def check_names(experiment: Experiment) -> None:
    """Look up every name, and check what must go together; cheap.

    Raises:
        UserError: one line with the place and the cure.
    """
    for check in NAMES:
        check(experiment)
