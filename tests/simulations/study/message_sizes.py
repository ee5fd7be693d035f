"""What the messages of an arm of a study weigh: the real server and the real wire, with clients
that learn noise, so that nothing is trained. One client is in no sum: class means are left out."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from client import requests as wire
from client.state import RetainedStore
from deal_core.config.experiment import Experiment, FederationConfig
from deal_core.config.run_config import to_run_config
from deal_core.methods import method_of, phases_of, statistics_of
from deal_core.models import adapter_shapes
from deal_core.privacy.interface import LocalUpdate
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.wire.adapter_record import pack_update
from server.clients import Roster, find_roster
from server.run import run
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from simulations.study.grid import grid
from simulations.study.study_file import load_study
from tests.server.fuzz_grid import counts, nudged

Bytes = Counter[tuple[str, str]]
"""``("up" | "down", record)`` to the bytes of its arrays in the whole run, of one client."""
SPACES = {
    "all-labels-medmcqa": {
        "basic-science": 3,
        "laboratory": 4,
        "medicine": 4,
        "surgery": 4,
        "head-and-neck": 3,
    },
    "all-labels-cl15-core": {
        "yelp": 5,
        "amazon": 5,
        "qqp": 2,
        "sst2": 2,
        "dbpedia": 14,
        "ag_news": 4,
        "yahoo": 10,
    },
    "all-labels-clinc10": {f"clinc_{number}": 15 for number in range(10)},
}
"""Study to its tasks and how many labels each has; the names of labels weigh nothing."""


def arm(study: str, name: str, folder: Path, *overrides: str) -> Experiment:
    """The experiment of an arm, with one client: what is sent to each is the same."""
    data = folder / "data"
    for task, labels in SPACES[study].items():
        (data / task).mkdir(parents=True)
        rows = [json.dumps({"text": "a", "text_pair": "b", "label": f"{n}"}) for n in range(labels)]
        for split in ("train", "test"):
            (data / task / f"{split}.jsonl").write_text("\n".join(rows))
    files = (
        f'data.path="{data}"',
        "data.source=files",
        f"data.tasks={json.dumps([*SPACES[study]])}",
    )
    cells = grid(load_study(study), folder / "study", ["federation.clients=1", *files, *overrides])
    [experiment] = next(cell.runs.values() for cell in cells if cell.arm == name and cell.seed == 0)
    Path(experiment.run.out).mkdir(parents=True)
    return experiment


def message_sizes(experiment: Experiment, *, sites: bool = False) -> Bytes:
    """Play the whole run; with ``sites`` the server waits for clients as it does for registered
    sites, and so lets a training request carry the evaluation before it."""
    weighed: Bytes = Counter()

    def weigh(way: str, message: Message) -> Message:
        for name, record in message.content.array_records.items():
            weighed[way, name] += sum(len(array.data) for array in record.values())
        return message

    grid = _Weighing(_app(experiment), to_run_config(experiment), experiment.federation.clients)
    grid.sent = lambda message: weigh("down", message)
    grid.interceptor = lambda reply: weigh("up", reply)
    waiting = patch("server.run.find_roster", _patient) if sites else nullcontext()
    with assume_identity(1, 1), waiting:
        run(grid, experiment)
    return weighed


def _patient(grid: Grid, config: FederationConfig) -> Roster:
    return replace(find_roster(grid, config), patience=1.0)


class _Weighing(InProcessGrid):
    def push_messages(self, messages):
        return super().push_messages([self.sent(message) for message in messages])


def _app(experiment: Experiment) -> ClientApp:
    app, method = ClientApp(), method_of(experiment)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    spaces = next(s for s in SPACES.values() if set(s) == set(experiment.data.tasks))
    runtime = SimpleNamespace(
        experiment=experiment,
        shapes=shapes,
        latest=Cache(),
        phase=lambda name: phases_of(method)[name],
        masked=lambda phase: False,
        statistics=statistics_of(method),
        tasks=experiment.data.tasks,
        labels=lambda task: ("",) * spaces[task],
    )
    store = RetainedStore(Path(experiment.run.out) / "sites" / "0")
    dtype = experiment.wire.dtype

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return Message(RecordDict({"site": ConfigRecord({"client": 0})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state, asked = wire.read_request(message, runtime, store)
        generator = seeded("noise", asked.stage, asked.server_round)
        told = None
        if asked.piggybacked_evaluation:
            told = "ok", counts(len(asked.piggybacked_evaluation))
        figures = {"num_examples": 100, "loss": 0.5, "seconds": 0.1}
        trained = frozenset(asked.trained)
        after = nudged(state.current, trained, generator)
        packed, _ = pack_update(after, state.current, dtype, trained, {}, generator)
        return wire.update_reply(message, LocalUpdate(packed, figures), asked, told)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        _, asked = wire.read_request(message, runtime, store)
        return wire.counts_reply(message, counts(len(asked.tasks)))

    return app
