"""What a round costs besides training, on the engine ``inprocess`` and on Flower's simulation
engine; and whole runs on one worker: seconds of a round, and memory."""

import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from measuring import Contestant, Figures, Window
from server.wire import collect
from simulations.api import run
from simulations.engines.inprocess import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity

TENSORS, BYTES = 24, 1_000_000
"""There and back; as many tensors as the embedded encoder's adapter has."""
CLIENTS = {"small": (), "usual": (10,), "full": (10, 100, 1000)}
RUNS: dict[str, dict[str, Any]] = {
    "small": {
        **{"data.tasks": ["surgery"], "data.max_train": 8, "data.max_test": 4},
        **{"federation.rounds": 1, "federation.clients": 2},
    },
    "usual": {"data.tasks": ["laboratory"], "data.max_train": 32, "data.max_test": 8},
    "full": {"data.tasks": ["basic-science", "laboratory"], "data.max_train": 600},
}
"""What is changed of `quickstart`, which is without class means here and has one thread."""
ALONE = {"run.workers": 1, "run.threads": 1, "method.prototype.enabled": "off"}


def client_app() -> ClientApp:
    """Return what sends back what it is sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"lora": message.content["lora"]}), reply_to=message)

    return app


def run_rounds(grid: Grid, clients: int) -> list[float]:
    """Return the seconds of four rounds in which nobody trains, or raise RuntimeError."""
    nodes: list[int] = []
    while len(nodes) < clients:
        nodes = list(grid.get_node_ids())
    arrays = [np.zeros(BYTES // 4 // TENSORS, np.float32) for _ in range(TENSORS)]
    spent = []
    for _ in range(4):
        started = time.perf_counter()
        content = RecordDict({"lora": ArrayRecord(arrays)})
        requests = {str(node): Message(content, node, MessageType.TRAIN) for node in nodes}
        for reply in collect(grid, requests, 600.0):
            if reply.message is None or reply.message.content["lora"] != content["lora"]:
                raise RuntimeError(f"client {reply.client}: {reply.fault or 'other bytes'}")
        spent.append(time.perf_counter() - started)
    return spent


def on_inprocess(clients: int) -> list[float]:
    """Return the seconds of rounds in this process alone."""
    with assume_identity(RUN_ID, SERVER_NODE):
        return run_rounds(InProcessGrid(client_app(), {}, clients), clients)


def on_flower(clients: int) -> list[float]:
    """Return the seconds of rounds of Flower's simulation engine, with a Ray actor a core."""
    spent: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        spent.extend(run_rounds(grid, clients))

    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client_app(), clients, backend_config=resources)
    return spent


def rounds(engine: Callable[[int], list[float]], clients: int) -> Window:
    """Return a window of an engine that is started anew; its first round is told apart."""

    def window() -> dict[str, float]:
        first, *rest = engine(clients)
        return {"work": clients, "seconds": median(rest), "first round, s": first}

    return window


def whole_run(settings: dict[str, Any]) -> Window:
    """Return a run; ``besides``: the share of its rounds in which no client trains."""

    def window() -> dict[str, float]:
        seconds: dict[str, list[float]] = {"round_finished": [], "client_finished": []}

        def listen(event: dict[str, Any]) -> None:
            if event["event"] in seconds:
                seconds[event["event"]].append(event.get("seconds", 0.0))

        with tempfile.TemporaryDirectory() as folder:
            run("quickstart", {**ALONE, **settings}, out=f"{folder}/run", listener=listen)
        spent, trained = seconds.values()
        return {"work": 1, "seconds": median(spent), "besides": 1 - sum(trained) / sum(spent)}

    return window


def main(given: Sequence[str] | None = None) -> None:
    """Measure and show rounds without training, then runs: ratios are to the first line."""
    figures = Figures("rounds", __doc__, given)
    for clients in CLIENTS[figures.size]:
        engines = (("inprocess", on_inprocess), ("Flower", on_flower))
        contestants = [Contestant(name, rounds, (make, clients)) for name, make in engines]
        figures.race(f"Rounds without training, {clients} clients", contestants, 1, warm_up=0)
    runs = [
        Contestant(precision, whole_run, ({**RUNS[figures.size], "train.precision": precision},))
        for precision in ("float32", "auto")
    ]
    figures.race("Whole runs", runs, windows=1, warm_up=0)


if __name__ == "__main__":
    main()
