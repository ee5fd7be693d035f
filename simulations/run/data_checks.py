"""Data that clients can read, divide and answer."""

from __future__ import annotations

from collections import Counter

from deal_core.config.experiment import Experiment
from deal_core.data import load_for_clients, open_source, partition
from deal_core.errors import UserError
from deal_core.models import check_label_tokens, decodes_apart, has_label_logits, max_positions
from deal_core.models.prompt import read_template
from deal_core.privacy.accounting.unit import unit_of
from deal_core.privacy.policy import require_delta
from server.plan import make_plan

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


def check_data(experiment: Experiment) -> None:
    """Plan who works on which task, read every task as the clients do and divide it among them.

    Raises:
        UserError: see :mod:`deal_core.data` and :func:`server.plan.make_plan`; or a task has no
            test example, and nothing could be said of its accuracy; or delta is too large for the
            records of a client.
    """
    source = open_source(experiment.data, experiment.privacy.unit_column)
    clients = [str(number) for number in range(experiment.federation.clients)]
    make_plan(experiment, source.task_names(), clients)
    privacy, units = experiment.privacy, Counter[int]()
    for name in source.task_names():
        task = load_for_clients(experiment, name)
        check_label_tokens(experiment.model, task.labels)
        shares = partition(
            task,
            experiment.data.partition,
            experiment.federation.clients,
            experiment.run.seed,
        )
        for client, own in enumerate(shares):
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
    """An answer that is a text needs a model that writes.

    Raises:
        UserError: it has another, or ``model.template`` has no place for a text.
    """
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
