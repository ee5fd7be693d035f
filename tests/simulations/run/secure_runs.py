"""Short runs under secure aggregation, and the same without; exchanges that are lost or cut off."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from client.app import make_app
from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.lora.state import State, to_arrays
from deal_core.models import adapter_shapes
from server.run import load_latest, run
from simulations.engines.inprocess import FIRST_CLIENT_NODE, InProcessGrid, Interceptor
from simulations.engines.worker_pool import assume_identity
from tests.simulations.runs import at
from tests.sizes import TINY_MODEL

EXAMPLES = 15
"""Of all clients together, ``data.max_train``: as many at each of three or five, as all weigh the
same."""
SHORT = (
    'data.tasks=["laboratory"]',
    f"data.max_train={EXAMPLES}",
    "federation.rounds=1",
    "train.precision=float32",
    "train.batch_size=4",
    "privacy.metrics=none",
    'data.partition.kind="iid"',
    "aggregation.secure=true",
    *TINY_MODEL,
)
POOLED = ("adapter.kind=pooled", "adapter.target_modules=[]", "adapter.first_layer=0")
EXCHANGES = ("announce", "prepare", "mask", "confirm", "unmask")


def exchange_of(message: Message) -> str:
    """Leg of a secure sum that a message belongs to; empty: none."""
    kind = message.metadata.message_type
    exchange = "mask" if kind == "train" else kind.removeprefix("query.")
    return exchange if exchange in EXCHANGES else ""


def client_of(reply: Message) -> str:
    return str(reply.metadata.src_node_id - FIRST_CLIENT_NODE)


@dataclass
class Ran:
    """What is left of a run.

    Attributes:
        state: after the last round.
        seen: record and field of all that has left a client, and how often.
    """

    state: State
    events: list[dict[str, Any]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    @property
    def factors(self) -> dict[str, NDArray[np.float32]]:
        return to_arrays(self.state.current)

    def told(self, event: str, key: str) -> list[Any]:
        return [each[key] for each in self.events if each["event"] == event]


class Stop(Exception):
    """Ends a run where a test wants it to."""


def lost(*exchanges: tuple[str, str]) -> Interceptor:
    """Loses the replies of clients in exchanges: (exchange, client)."""
    return lambda reply: None if (exchange_of(reply), client_of(reply)) in exchanges else reply


def rounds(
    experiment: Experiment,
    folder: Path,
    see: Interceptor = lambda reply: reply,
    last: int = 1,
    grid_of: Callable[..., InProcessGrid] = InProcessGrid,
) -> Ran:
    """Run until so many rounds are over; their checkpoint is read again."""
    events: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()

    def watched(reply: Message | None) -> Message | None:
        if reply is None:  # its process has ended
            return None
        for name, record in reply.content.items():
            seen.update(f"{name}.{key}" for key in record)
        return see(reply)

    def listen(event: Mapping[str, Any]) -> None:
        events.append(dict(event))
        begun = sum(each["event"] == "round_started" for each in events)
        over = event["event"] == "stage_finished" or (
            begun > last and event["event"] == "round_started"
        )
        if over:
            raise Stop

    folder.mkdir(exist_ok=True)
    experiment = at(experiment, folder, resume=(folder / "checkpoint.safetensors").exists())
    grid = grid_of(make_app(), to_run_config(experiment), experiment.federation.clients)
    grid.interceptor = watched
    try:
        with assume_identity(1, 1):
            run(grid, experiment, listen)
    except Stop:
        pass
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    checkpoint, _ = load_latest(folder / "checkpoint.safetensors", shapes)
    return Ran(checkpoint.state, events, seen)
