"""The parts of a round on plain objects: training of a client, aggregation, and right answers;
without messages, files and privacy ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deal_core.aggregation.rule import ClientUpdate, finished
from deal_core.aggregation.rules import make_rule
from deal_core.config.experiment import Experiment
from deal_core.config.method import OWN_MEMORY
from deal_core.data import Example
from deal_core.deal.interface import LocalTask, Phase, phases_of
from deal_core.errors import UserError
from deal_core.lora.attach import read
from deal_core.lora.kinds import kind_of
from deal_core.lora.state import State
from deal_core.methods import method_of
from deal_core.models import adapter_shapes, load_model
from deal_core.models.interface import LanguageModel
from deal_core.models.loading import best_device
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.evaluation import count_correct
from deal_core.training.hardware import compute_dtype, threads
from deal_core.training.loop import load_state, train
from deal_core.wire.instruction import LEARN
from server.strategy import sendable, start_state
from server.summation import fold_residual


def load_base(experiment: Experiment) -> LanguageModel:
    """Return the frozen base model of an experiment, with a zero adapter, on the best device.

    Raises:
        UserError: unknown family or name, or weights that are missing or altered.
    """
    dtype = compute_dtype(experiment.train, best_device())
    return load_model(experiment.model, experiment.adapter, experiment.train.max_length, dtype)


def train_client(
    model: LanguageModel,
    state: State,
    examples: Sequence[Example],
    labels: Sequence[str],
    experiment: Experiment,
    *,
    client: str = "0",
    stage: int = 0,
    server_round: int = 1,
    seen: Sequence[Sequence[str]] = (),
    future: Sequence[Sequence[str]] = (),
    instruction: str = "",
) -> ClientUpdate:
    """Return what a client learns from its examples by the method of the experiment: the adapter
    after training, which weighs the number of examples.

    It is the round of learning alone, and without privacy: class means, noise and ledgers are
    parts of a whole :func:`run`.

    Args:
        model: of :func:`load_base`; its adapter is overwritten.
        state: what the round begins with; it stays as it is.
        examples: the client's own of the task.
        labels: of the task.
        experiment: method, aggregation rule (which says what is trained), training, seed.
        client: its number, as text; with stage and round it fixes the order of the examples.
        stage: number of the task, from 0.
        server_round: within the task, from 1.
        seen: labels of each earlier task; what they are answered with is distilled.
        future: labels of each task to come that the stream names.
        instruction: what a prompt asks for (generative models); empty: the usual.

    Raises:
        UserError: a method that keeps something at the client or that does not train, a privacy
            mechanism, no examples, one of another label, or a generating model that is to be taught
            what it ``seen``, which takes the prompts of a whole run.
    """
    phase = _learning(experiment)
    if not examples:
        raise UserError(f"client {client}: no examples; leave it out of the round")
    if seen and not model.has_label_logits:
        raise UserError(
            "train_client: a model that answers in words is asked with the prompts of earlier "
            "tasks, which a whole run knows; use run, or leave seen out"
        )
    require_labels(examples, labels)
    data = model.encode(examples, labels, instruction)
    load_state(model, state)
    task = LocalTask(labels, seen, future=lambda: future)
    number = int(client) if client.isdigit() else client  # as in a whole run, so that both agree
    train(
        model,
        phase.objective(model, state, task, data, Cache()),
        data,
        make_rule(experiment.aggregation).trained,
        experiment.federation.local_epochs,
        experiment.train,
        seeded(experiment.run.seed, "train", number, stage, server_round),
    )
    return ClientUpdate(client, read(model.module), float(len(data)))


def require_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Refuse an example whose answer is none of the labels; without labels answers are texts."""
    for number, example in enumerate(examples):
        if labels and example.label not in labels:
            raise UserError(
                f"example {number}: its label '{example.label}' is not one of "
                f"{', '.join(labels)}; add it, or leave the example out"
            )


def _learning(experiment: Experiment) -> Phase:
    name, mechanism = experiment.method.name, experiment.privacy.mechanism
    if mechanism != "none":
        raise UserError(
            f"privacy.mechanism '{mechanism}': train_client keeps no ledger and adds no noise; use "
            "run, or set it to none"
        )
    phase = phases_of(method_of(experiment))[LEARN]
    if name in OWN_MEMORY or phase.statistics is not None:
        what = "does not train" if phase.statistics is not None else "keeps data at its clients"
        raise UserError(
            f"method.name '{name}' {what}, so it needs a whole run; use run, or another method"
        )
    return phase


@dataclass(frozen=True)
class Aggregated:
    """The result of a round."""

    state: State
    """What the next round begins with."""
    error: float | None
    """Aggregation error, 0: exact; None: not known (docs/method.md, (M24))."""


def start(experiment: Experiment) -> State:
    """Return the state before the first task: all adapters zero. No weights are read.

    Raises:
        UserError: unknown family or name of the model.
    """
    return start_state(experiment, adapter_shapes(experiment.model, experiment.adapter))


def begin_task(state: State, experiment: Experiment, stage: int = 0) -> State:
    """Return the state with which the first round of a task begins: a fresh current adapter.

    Args:
        state: of :func:`start`, or of :func:`end_task` for the task before.
        experiment: method and seed.
        stage: number of the task, from 0.

    Raises:
        UserError: an unknown method, or a kind of adapter that needs the whole stream.
    """
    kind = experiment.adapter.kind
    if kind_of(experiment.adapter).begin_task is not None:
        raise UserError(f"adapter.kind '{kind}' is laid out for a whole stream; use run, or lora")
    with threads(1):
        generator = seeded(experiment.run.seed, "begin", stage)
        return sendable(method_of(experiment).begin_task(state, generator))


def aggregate(
    state: State,
    updates: Sequence[ClientUpdate],
    experiment: Experiment,
    *,
    server_round: int = 1,
) -> Aggregated:
    """Return the state after a round: the updates, aggregated by the rule of the experiment.

    Args:
        state: what the clients have begun with.
        updates: of :func:`train_client`, or your own; a weight counts relative to the others.
        experiment: ``aggregation``; nothing else of it matters.
        server_round: within the task, from 1.

    Raises:
        UserError: an unknown rule.
        ValueError: no update, or one that does not fit the state.
    """
    with threads(1):
        aggregation = make_rule(experiment.aggregation).begin(state.current)
        for update in updates:
            aggregation.add(update)
        result = finished(aggregation)
        return Aggregated(sendable(fold_residual(state, result)), result.error)


def end_task(state: State, experiment: Experiment) -> State:
    """Return the state after a task: what was learnt joins the retained adapter."""
    with threads(1):
        return sendable(method_of(experiment).end_task(state))


def evaluate(
    model: LanguageModel,
    state: State,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    instruction: str = "",
) -> float:
    """Return the share of examples that are answered rightly among ``labels``, by their names.

    Args:
        model: of :func:`load_base`; its adapter is overwritten.
        state: the adapters, at any moment.
        examples: test examples of one task.
        labels: of that task; none: answers are texts, and the share is ROUGE-L.
        instruction: what a prompt asks for (generating models); empty: the usual.

    Raises:
        UserError: no examples, or one of another label.
    """
    if not examples:
        raise UserError("evaluate: no examples")
    require_labels(examples, labels)
    load_state(model, state)
    data = model.encode(examples, labels, instruction)
    return count_correct(model, data, labels) / len(examples)
