"""What the server does in a round and around a task, on plain objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deal_core.aggregation import ClientUpdate, finished, make_rule
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.kinds import kind_of
from deal_core.lora.state import State
from deal_core.methods import method_of
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from deal_core.training.hardware import threads
from server.strategy import sendable, start_state
from server.summation import fold_residual


@dataclass(frozen=True)
class Aggregated:
    """The result of a round.

    Attributes:
        state: what the next round begins with.
        error: aggregation error, 0: exact; None: not known (docs/method.md, (M24)).
    """

    state: State
    error: float | None


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
        aggregation = make_rule(experiment.aggregation).begin(state.current, server_round)
        for update in updates:
            aggregation.add(update)
        result = finished(aggregation)
        return Aggregated(sendable(fold_residual(state, result)), result.error)


def end_task(state: State, experiment: Experiment) -> State:
    """Return the state after a task: what was learnt joins the retained adapter.

    Raises:
        UserError: an unknown method.
    """
    with threads(1):
        return sendable(method_of(experiment).end_task(state))
