"""Rounds of one's own, on the hooks of every Flower strategy: the update of a client whose disk is
broken is left out."""

import tempfile
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from transformers import AutoModel, AutoTokenizer

from deal_core.data.embedded import asset_folder
from simulations.api import Deal, DealClient, DealStrategy, simulate

weights = asset_folder("minilm")
model, tokenizer = AutoModel.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
labels = ("visa", "flight")
rows = [(f"my {label}, {n}", label) for n in range(20) for label in labels]


def broken(message: Message, context: Context, app: Any) -> Message:
    """Answer with large numbers in the place of an update; a mod, as Flower has them."""
    reply: Message = app(message, context)
    if "lora" in reply.content:
        sent = reply.content.array_records["lora"]
        sent.update({k: Array(np.full(a.shape, 0.5, np.float32)) for k, a in sent.items()})
    return reply


def client(number: int) -> DealClient:
    """Return a client; the last one's disk is broken."""
    own = {"travel": (rows[number::3], rows[:8])}
    return DealClient(model, tokenizer, own, mods=[broken] if number == 2 else [])


def size(reply: Message) -> float:
    """Return the length of an update."""
    arrays = reply.content.array_records["lora"].to_numpy_ndarrays()
    return float(np.linalg.norm([np.linalg.norm(array) for array in arrays]))


class Careful(DealStrategy):
    """DEAL with a loop of its own: an update three times as long as the median is left out."""

    def start(self, grid: Grid, *others: Any, **more: Any) -> Result:
        """Play two rounds."""
        nothing = ArrayRecord(), ConfigRecord()
        for number in (1, 2):
            replies = list(grid.send_and_receive(self.configure_train(number, *nothing, grid)))
            usual = np.median([size(reply) for reply in replies])
            kept = [reply for reply in replies if size(reply) <= 3 * usual]
            self.aggregate_train(number, kept)
            asked = self.configure_evaluate(number, *nothing, grid)
            found = self.aggregate_evaluate(number, grid.send_and_receive(asked))
            print(f"round {number}: {len(kept)} of {len(replies)} updates {dict(found or {})}")
        return Result(self.arrays)


with tempfile.TemporaryDirectory() as folder:
    strategy = Careful(clients=3, rounds=2, method=Deal(class_means="off"))
    simulate(client, strategy, {"travel": labels}, out=folder)
