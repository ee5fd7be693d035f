"""Checks of names, rules and sums, and of data that clients can read, divide and answer; torch is
imported here. Every check raises a ``UserError`` with the place and the cure, or gives findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from client.gate import Asked, require
from deal_core.aggregation.rules import (
    AGGREGATION_RULES,
    MEANS_OF_FACTORS,
    RULES_OF_KINDS,
    make_rule,
)
from deal_core.config.experiment import AggregationConfig, Experiment
from deal_core.data import TaskData, load_for_clients, open_source, partition
from deal_core.deal.interface import statistics_of
from deal_core.errors import UserError
from deal_core.lora.kinds import kind_of, rule_of
from deal_core.methods import FEWEST_IN_SUM, RULES, method_of, texts_at_once
from deal_core.models import (
    adapter_shapes,
    check_label_tokens,
    check_weights,
    decodes_apart,
    has_label_logits,
    max_positions,
)
from deal_core.models.loading import check_bits, pretrained
from deal_core.models.prompt import INSTRUCTION, read_template
from deal_core.privacy.events import unit_of
from deal_core.privacy.policy import require_delta
from deal_core.protection import class_sum_noise, make_mechanism
from deal_core.secure_sum.terms import LEAST_SITES
from server.folder import check_tracker
from server.plan import make_plan
from simulations.run.expected_membership import expected_auc
from simulations.run.quick_checks import Check, Finding, check_unit, warning

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


def check_data(experiment: Experiment) -> None:
    """Plan who works on which task; read and divide every task as the clients do."""
    source = open_source(experiment.data, experiment.privacy.unit_column)
    clients = [str(number) for number in range(experiment.federation.clients)]
    make_plan(experiment, source.task_names(), clients)
    privacy, units = experiment.privacy, Counter[int]()
    for name in source.task_names():
        task = load_for_clients(experiment, name)
        check_label_tokens(experiment.model, task.labels)
        divided = partition(task, experiment.data.partition, len(clients), experiment.run.seed)
        for client, own in enumerate(divided):
            units[client] += own.units(bool(privacy.unit_column))
        if not task.test:
            problem = "no test row; add some, or leave the task out"
            if task.held_out:
                share = f"data.split = {experiment.data.split:g}"
                problem = f"{share} leaves no test row; raise it, or add a test file"
            raise UserError(f"task '{name}': {problem}")
    if privacy.mechanism == "record":
        require_delta(privacy.target_delta, max(units.values()), unit_of(privacy))


def check_answers(experiment: Experiment) -> None:
    """A text-generation task needs a generative model, and every prompt a place for the text."""
    model, texts = experiment.model, experiment.data.generation
    if texts and has_label_logits(model):
        raise UserError(
            f"data.generation: answers of '{texts[0]}' are texts, and model.family "
            f"'{model.family}' chooses among labels; use causal-lm or seq2seq-lm"
        )
    try:
        read_template(model.template)
    except ValueError as error:
        raise UserError(f"model.template: {error}") from None


def check_lengths(experiment: Experiment) -> None:
    """A text, and an answer that is written below it, fit into the model."""
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


LOOKED_AT = 400
"""Examples of a task, at equal distances: to tokenise all would take too long."""
FEW = 8
"""Tokens of a text below which it says nothing."""
MANY = 0.1
"""Share of cut texts from which it is worth a line."""


def check_text_lengths(experiment: Experiment) -> Iterator[Finding]:
    """Yield a warning for tasks of which many texts are cut at ``train.max_length``, for those of
    which some answers are cut at ``model.max_new_tokens``, and for those whose prompt does not fit
    beside a text of ``train.max_length``; an error where it does not fit beside one that is there.
    """
    from transformers import AutoTokenizer

    model, longest = experiment.model, experiment.train.max_length
    tokenizer, generative = pretrained(AutoTokenizer, model.name), not has_label_logits(model)
    positions = max_positions(model) if generative else 0  # of a GGUF file that takes seconds
    source = open_source(experiment.data)
    for name in source.task_names():
        task = source.load(name)
        examples = task.train[:: max(1, -(-len(task.train) // LOOKED_AT))]
        texts = token_counts(tokenizer, [example.text for example in examples])
        cut = sum(count > longest for count in texts)
        if cut > MANY * len(texts):
            yield warning(
                f"task '{name}': {cut} of {len(texts)} texts looked at have more than "
                f"train.max_length = {longest} tokens (up to {max(texts)}); the rest is cut off"
            )
        targets = [example.target for example in examples]
        answers = token_counts(tokenizer, targets if name in experiment.data.generation else ())
        cut = sum(count > model.max_new_tokens for count in answers)
        if cut:  # from the first on: nothing says that what is cut has ended
            yield warning(
                f"task '{name}': {cut} of {len(answers)} answers looked at have more than "
                f"model.max_new_tokens = {model.max_new_tokens} tokens (up to {max(answers)}); the "
                f"rest is neither learnt nor written; set model.max_new_tokens to {max(answers)}"
            )
        if generative:
            there = min(longest, max(texts, default=0))
            yield from _prompt(experiment, tokenizer, positions, task, there)


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, marks of the tokeniser left out."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
    return [len(each) for each in ids["input_ids"]]


def _prompt(
    experiment: Experiment, tokenizer: Any, positions: int, task: TaskData, there: int
) -> Iterator[Finding]:
    """``there``: tokens that are read of the longest text looked at."""
    model, text = experiment.model, experiment.train.max_length
    instruction = experiment.data.instructions.get(task.name, INSTRUCTION)
    around = read_template(model.template).around(instruction, task.labels)
    beside = sum(token_counts(tokenizer, around))
    answer = max(token_counts(tokenizer, task.labels), default=model.max_new_tokens)
    room = positions - beside - (0 if decodes_apart(model) else answer)
    if positions and text > room:
        cure = f"lower train.max_length to {room}"
        if room < FEW:
            cure = "shorten its instruction or its labels, or choose another model"
        yield Finding(
            f"task '{task.name}': its prompt has {beside} tokens, and with train.max_length = "
            f"{text} and an answer of {answer} that is more than the {positions} that the model "
            f"reads; {cure}",
            kind="error" if there > room else "warning",
        )


def check_membership(experiment: Experiment) -> Iterator[Finding]:
    """Yield a note for an experiment with class sums: the area under the curve of the best attack
    on the sum over sites, for the smallest label and the median one."""
    statistics = statistics_of(method_of(experiment))
    if statistics is None or statistics.exact is not None:
        return
    source, counts = open_source(experiment.data), Counter[tuple[str, str]]()
    names = source.task_names()
    for task in map(source.load, names):
        counts.update((task.name, each.label) for each in task.train if each.label)
    if not counts:
        return
    clients = len(experiment.federation.sites) or experiment.federation.clients
    multiplier, _ = class_sum_noise(experiment, statistics, clients, len(names))
    directions = statistics.size(experiment.model)
    sizes = {"smallest": min(counts.values()), "median": int(median(counts.values()))}
    told = [
        f"{expected_auc(size, directions, multiplier):.2f} for the {which} label ({size} records)"
        for which, size in sizes.items()
    ]
    yield Finding(
        "class sums, against the server and the sites that may collude: expected AUC of the best "
        f"membership attack {', '.join(told)}; 0.5 is chance; deal audit --membership measures it",
        kind="note",
    )


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
