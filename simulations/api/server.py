"""The server of a federation as a Flower strategy, and a run of it on this machine."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from logging import INFO
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from safetensors.numpy import load_file

from deal_core.config.data import ENTITY_F1, DataConfig
from deal_core.config.experiment import Experiment
from deal_core.config.file import EXPERIMENT, parse_tables, to_run_config
from deal_core.data import Example
from deal_core.data.given import keep_rows
from deal_core.data.source import Sides
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.models import FAMILIES, adapter_shapes
from deal_core.models.loading import GivenModel, Loss, Predict, keep
from server import run as server_run
from server.app import with_run_folder
from server.clients import Clients, find_roster
from server.folder import EventLog, Listener, RunFolder
from server.plan import make_plan
from server.strategy import DealStrategy as Rounds
from server.strategy import start_state
from server.wire import as_record
from simulations.api import program
from simulations.api.client import DealClient
from simulations.api.nouns import Deal, RecordDP, method_settings, read_model, require_possible
from simulations.api.runs import Config, Run, experiment, placed
from simulations.engines.flower import run_flower
from simulations.engines.inprocess import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity
from simulations.run.experiment import Request
from simulations.run.simulate import claimed, prepare

Tasks = Mapping[str, Sequence[str]]
"""Name of a task, in their order, to its labels; none: its answers are texts."""


class DealStrategy(Rounds):
    """The rounds of a run as a strategy for anybody's ``ServerApp``: ``strategy.start(grid)``.

    Settings that are not given are those of ``config``. For :func:`simulate` model, tasks, method
    and privacy may be left out: they are then those of the clients.

    Args:
        model: as of :class:`~simulations.api.DealClient`: the same weights.
        tokenizer: of the model.
        tasks: name of a task to its labels, in the order in which they are learnt.
        config: a name from ``deal ls``, a path, nested tables, or an experiment.
        overrides: dotted keys and their values, such as ``{"train.learning_rate": 1e-3}``.
        method: ``Deal(...)``, or the name of a baseline.
        privacy: what is asked of the clients.
        clients: how many take part.
        rounds: of every task.
        out: run folder; empty: below ``~/federated-deal-runs``.
        loss: as of a client.
        predict: as of a client.

    Raises:
        UserError: bad settings.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        tasks: Tasks | None = None,
        *,
        config: Config | None = None,
        overrides: Mapping[str, Any] | None = None,
        method: Deal | str | None = None,
        privacy: RecordDP | None = None,
        clients: int | None = None,
        rounds: int | None = None,
        out: str | Path = "",
        loss: Loss | None = None,
        predict: Predict | None = None,
    ) -> None:
        counts = {"federation.clients": clients, "federation.rounds": rounds, "run.out": str(out)}
        self.own = {key: value for key, value in counts.items() if value} | dict(overrides or {})
        self.own |= method_settings(method) | ({} if privacy is None else privacy.settings)
        self.asked = experiment({} if config is None else config, self.own)
        self._tasks, self._found = tasks, False
        self._settled: Experiment | None = None
        self._model = None if model is None else read_model(model, tokenizer, loss, predict)

    def settle(
        self, model: GivenModel, tasks: Tasks, source: str = "sites", more: Mapping[str, Any] = {}
    ) -> Experiment:
        """Return the experiment of these rounds.

        Args:
            model: that the clients train.
            tasks: with their labels.
            source: of the rows, where this process has them.
            more: dotted keys and their values, which come last.

        Raises:
            UserError: the model cannot do what is asked of it.
        """
        came = {f"adapter.{key}": value for key, value in model.adapter.items()}
        asked = experiment(self.asked, {**came, **self.own, **more})
        texts = [task for task, labels in tasks.items() if not labels]
        measures = {task: asked.data.measure(task) for task in texts}
        if FAMILIES[model.family].tags:
            measures = dict.fromkeys(tasks, ENTITY_F1)
        tables = {
            "source": source,
            "tasks": list(tasks),
            "labels": {task: list(labels) for task, labels in tasks.items() if labels},
            "generation": texts,
            "measures": measures,
            "instructions": asked.data.instructions,
            "public_path": asked.data.public_path,
            "partition": {"kind": "column"},
        }
        named = {"family": model.family, "name": keep(model)}
        parts = {
            "data": parse_tables(DataConfig, tables, "tasks"),
            "model": asked.model.model_copy(update=named),
        }
        self.experiment = asked.model_copy(update=parts)
        return self.experiment

    @property
    def experiment(self) -> Experiment:
        """All settings; UserError where model or tasks are missing."""
        if self._settled is not None:
            return self._settled
        if self._model is None or self._tasks is None:
            raise UserError("DealStrategy: pass model, tokenizer and tasks")
        return self.settle(self._model, self._tasks)

    @experiment.setter
    def experiment(self, settled: Experiment) -> None:
        require_possible(settled)
        self._settled = settled

    def start(
        self, grid: Grid, *others: Any, listener: Listener | None = None, **more: Any
    ) -> Result:
        """Return the result of all rounds, with a checkpoint after each; all else is in the run
        folder: ``load_run(strategy.experiment.run.out)``.

        Args:
            grid: of the ``ServerApp``.
            others: none.
            listener: called with every event of the run.
            more: none.

        Raises:
            UserError: bad settings, or a run that cannot go on.
        """
        if others or more:
            raise UserError("DealStrategy.start takes the grid alone; settings are the strategy's")
        settled = self.experiment = with_run_folder(self.experiment, grid.run.run_id)
        results = server_run.run(cast(Grid, Telling(grid, settled)), settled, listener)
        arrays = load_file(find_adapter(Path(settled.run.out)).weights)
        last = dict(zip(results.tasks, results.accuracy_matrix[-1], strict=True))
        known = MetricRecord({task: value for task, value in last.items() if value is not None})
        rounds = len(results.aggregation_error)
        return Result(as_record(arrays), evaluate_metrics_clientapp={rounds: known})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of a round, as under Flower's own loop."""
        if not self._found:
            self._find(grid)
        return told(super().configure_train(server_round, arrays, config, grid), self.experiment)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the requests of an evaluation, likewise."""
        return told(super().configure_evaluate(server_round, arrays, config, grid), self.experiment)

    def summary(self) -> None:
        """Log what the strategy does."""
        log(INFO, "DEAL: %s rounds a task", self.experiment.federation.rounds)

    def _find(self, grid: Grid) -> None:
        """Find the clients, and begin with a new state; without a checkpoint."""
        settled = self.experiment = with_run_folder(self.experiment, grid.run.run_id)
        Path(settled.run.out).mkdir(parents=True, exist_ok=True)
        grid = cast(Grid, Telling(grid, settled))
        roster = find_roster(grid, settled.federation)
        events = EventLog(RunFolder(Path(settled.run.out)).metrics)
        plan = make_plan(settled, settled.data.tasks, roster.clients)
        state = start_state(settled, adapter_shapes(settled.model, settled.adapter))
        super().__init__(Clients(grid, settled, roster, events), plan, state)
        self._found = True


def told(messages: Iterable[Message], settled: Experiment) -> list[Message]:
    """Return messages that say which experiment they are of."""
    found, record = list(messages), ConfigRecord(to_run_config(settled))  # type: ignore[arg-type]
    for message in found:
        message.content[EXPERIMENT] = record
    return found


class Telling:
    """A grid whose messages say which experiment they are of: a ``ServerApp`` of one's own has no
    run config that does."""

    def __init__(self, grid: Grid, settled: Experiment) -> None:
        self._grid, self._settled = grid, settled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        return self._grid.push_messages(told(messages, self._settled))


def simulate(
    client_fn: Callable[[int], DealClient],
    strategy: DealStrategy,
    tasks: Tasks,
    *,
    engine: str = "inprocess",
    out: str | Path = "",
    resume: bool = False,
    listener: Listener | None = None,
) -> Run:
    """Return a run on this machine, finished: the clients' own apps and the strategy, one base
    model for all of them. It prints nothing; warnings are Python warnings.

    Args:
        client_fn: number of a client, from 0, to the client.
        strategy: of the server; what it leaves out of method and privacy the clients say.
        tasks: name of a task to its labels, in the order in which they are learnt.
        engine: ``inprocess``; or Flower's runtime, each of whose processes runs the program again
            up to this call: ``flower`` (simulation), ``loopback`` (a SuperLink, and a SuperNode
            for every client).
        out: run folder; empty: the strategy's, or ``runs/python-seedN``.
        resume: continue the run in the folder.
        listener: called with every event of the run.

    Raises:
        UserError: clients of several models, what a client does not take part in, bad input
            (nothing has started), or a run that cannot go on.
    """
    call = next(program.calls)
    clients = [client_fn(number) for number in range(strategy.asked.federation.clients)]
    first = clients[0]
    if any(client.model.name != first.model.name for client in clients):
        raise UserError("simulate: the clients have different models; load one, for all of them")
    source = keep_rows(_together(clients, tasks))
    here = _demanded(strategy, clients) | {"run.engine": engine}
    here |= {"run.workers": 1} if engine == "inprocess" else {}
    settled = strategy.settle(first.model, tasks, source, here)
    settled = placed(settled, None, Request("python", str(out), resume=resume))
    for client in clients:
        client.require_allowed(settled)
    if program.hand_over(call, clients, strategy):
        return Run(Path(settled.run.out))
    again = {} if engine == "inprocess" else program.environment(call)
    prepare(settled, lambda line: warnings.warn(line, stacklevel=4))

    def answer(message: Message, context: Context) -> Message:
        return clients[int(context.node_config["partition-id"])](message, context)

    with claimed(settled), assume_identity(RUN_ID, SERVER_NODE):
        if again:
            run_flower(settled, listener or (lambda event: None), program.APP, again)
            return Run(Path(settled.run.out))
        strategy.experiment = settled
        grid = InProcessGrid(cast(ClientApp, answer), {}, len(clients))
        strategy.start(grid, listener=listener)
    return Run(Path(settled.run.out))


def _demanded(strategy: DealStrategy, clients: Sequence[DealClient]) -> dict[str, Any]:
    """Return dotted keys to what the clients demand: a method, where the strategy names none, and
    the strictest protection."""
    methods = [client.method for client in clients if client.method is not None]
    named = "method.name" in strategy.own
    found, asked = method_settings(None if named or not methods else methods[0]), strategy.asked
    for own in (client.privacy for client in clients if client.privacy is not None):
        if asked.privacy.mechanism == "none":
            asked = experiment(asked, own.settings)
        asked = asked.model_copy(update={"privacy": own.within(asked.privacy)})
    keys = "mechanism", "target_epsilon", "target_delta", "max_grad_norm"
    return found | {f"privacy.{key}": getattr(asked.privacy, key) for key in keys}


def _together(clients: Sequence[DealClient], tasks: Tasks) -> dict[str, Sides]:
    def side(task: str, which: int) -> tuple[Example, ...]:
        found = (client.rows.get(task, ((), ()))[which] for client in clients)
        return tuple(replace(row, group=f"{k:06}") for k, own in enumerate(found) for row in own)

    return {task: (side(task, 0), side(task, 1)) for task in tasks}
