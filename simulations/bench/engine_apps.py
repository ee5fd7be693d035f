"""Rounds in which nobody trains: what an engine costs by itself.

``python -m simulations.bench.engine_apps ENGINE CLIENTS BYTES ROUNDS FILE`` runs them and writes
the seconds of each round. The apps are the same for both engines.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from server.reply_collection import collect
from simulations.engines.flower_identity import assume_identity
from simulations.engines.inprocess import RUN_ID, SERVER_NODE, InProcessGrid

RECORD = "lora"
PATIENCE_SECONDS = 600.0
TENSORS = 24
"""As many as the embedded encoder's adapter has."""


def client_app() -> ClientApp:
    """Sends back what it is sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({RECORD: message.content[RECORD]}), reply_to=message)

    return app


def run_rounds(grid: Grid, clients: int, size: int, rounds: int) -> list[float]:
    """Send every client ``size`` bytes in each round, and wait for all to send them back.

    Returns:
        Seconds of each round.

    Raises:
        RuntimeError: a client failed, or other bytes came back.
    """
    nodes: list[int] = []
    while len(nodes) < clients:
        nodes = list(grid.get_node_ids())
    sent = [np.zeros(size // 4 // TENSORS, np.float32) for _ in range(TENSORS)]
    spent = []
    for _ in range(rounds):
        started = time.perf_counter()
        content = RecordDict({RECORD: ArrayRecord(sent)})
        requests = {str(node): Message(content, node, MessageType.TRAIN) for node in nodes}
        for reply in collect(grid, requests, PATIENCE_SECONDS):
            if reply.message is None:
                raise RuntimeError(f"client {reply.client}: {reply.fault}")
            if reply.message.content[RECORD] != content[RECORD]:
                raise RuntimeError(f"client {reply.client}: other bytes came back")
        spent.append(time.perf_counter() - started)
    return spent


def on_inprocess(clients: int, size: int, rounds: int) -> list[float]:
    """This process alone."""
    grid = InProcessGrid(client_app(), {}, clients)
    with assume_identity(RUN_ID, SERVER_NODE):
        return run_rounds(grid, clients, size, rounds)


def on_flower(clients: int, size: int, rounds: int) -> list[float]:
    """Flower's simulation engine with one Ray actor per core."""
    from flwr.simulation import run_simulation

    spent: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        spent.extend(run_rounds(grid, clients, size, rounds))

    resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client_app(), clients, backend_config=resources)
    return spent


ENGINES = {"inprocess": on_inprocess, "flower": on_flower}

if __name__ == "__main__":
    engine, *numbers, out = sys.argv[1:]
    Path(out).write_text(json.dumps(ENGINES[engine](*map(int, numbers))), encoding="utf-8")
