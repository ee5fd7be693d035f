"""A federation without a language model, whose replies are spoilt on their way to the server."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client import requests as wire
from client.identity import Client, ClientRequest
from deal_core.config.experiment import Experiment
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.privacy.interface import LocalUpdate
from deal_core.randomness import seeded
from deal_core.training.loop import Cache
from deal_core.wire.tensors import pack_update
from server.folder import RunFolder
from server.run import load_checkpoint
from simulations.engines.inprocess import FIRST_CLIENT_NODE, InProcessGrid

Shapes = dict[str, tuple[int, int]]
Tamper = Callable[[str, Message], list[Message]]
"""From the client's name and its reply to what arrives of it."""


def tiny_app(
    experiment: Experiment, shapes: Shapes, weigh: Callable[[int], float] = lambda n: 10 + n
) -> ClientApp:
    """Clients that read and write as the real ones do, learn noise in between, and say that they
    have so many examples."""
    app = ClientApp()
    learning = SimpleNamespace(statistics=None)
    runtime = SimpleNamespace(
        experiment=experiment, shapes=shapes, latest=Cache(), phases={"learn": learning}
    )

    def read(message: Message, context: Context) -> ClientRequest:
        number = int(context.node_config["partition-id"])
        folder = Path(experiment.run.out) / "sites" / str(number)
        return wire.read_request(message, Client(number, folder, experiment), runtime)

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        site = ConfigRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"site": site}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = read(message, context)
        number, state, instruction = request.client.number, request.state, request.instruction
        generator = seeded("noise", number, instruction.stage, instruction.server_round)
        trained = frozenset(instruction.trained)
        adapter = nudged(state.current, trained, generator)
        dtype = experiment.wire.dtype
        figures = {"num_examples": weigh(number), "loss": 0.5, "seconds": 0.1}
        encoded, _ = pack_update(adapter, state.current, dtype, trained, {}, generator)
        return wire.update_reply(message, LocalUpdate(encoded, figures), instruction)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return wire.counts_reply(message, counts(len(read(message, context).instruction.tasks)))

    return app


def counts(tasks: int) -> dict[str, list[int]]:
    """One of two examples, of every task."""
    return {"correct": [1] * tasks, "examples": [2] * tasks, "correct_all": [1] * tasks}


def nudged(adapter: Adapter, trained: frozenset[str], generator: torch.Generator) -> Adapter:
    """The adapter with small noise on the trained factors."""

    def moved(value: torch.Tensor, factor: str) -> torch.Tensor:
        noise = 0.05 * torch.randn(value.shape, generator=generator)
        return value + noise if factor in trained else value

    layers = {
        name: LoraFactors(moved(f.A, "lora_A"), moved(f.B, "lora_B"))
        for name, f in adapter.layers.items()
    }
    return Adapter(layers, adapter.scaling)


@dataclass
class FuzzGrid:
    """Passes every reply through ``tamper``; notes the model whenever the server sends it out."""

    inner: InProcessGrid
    shapes: Shapes
    folder: RunFolder
    tamper: Tamper
    models: list[list[bytes]] = field(default_factory=list)
    held_back: list[Message] = field(default_factory=list)
    overdue: list[Message] = field(default_factory=list)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        checkpoint = load_checkpoint(self.folder.checkpoint, self.shapes)
        self.models.append([bytes_of(part) for part in checkpoint.state.parts()])
        self.overdue, self.held_back = self.held_back, []
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived, self.overdue = self.overdue, []
        for reply in self.inner.pull_messages(message_ids):
            client = str(reply.metadata.src_node_id - FIRST_CLIENT_NODE)
            arrived += self.tamper(client, reply)
        return arrived


def bytes_of(adapter: Adapter) -> bytes:
    """All values of an adapter, to the bit."""
    return b"".join(f.A.numpy().tobytes() + f.B.numpy().tobytes() for f in adapter.layers.values())


def lost(reply: Message) -> list[Message]:
    """A Flower error in the place of a reply."""
    failure = Message(RecordDict(), reply_to=reply)
    failure.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    failure.__dict__.update(_content=None, _error=Error(2, "lost"))
    return [failure]


def tiny_model(folder: Path) -> Path:
    """A folder that names the layers of a small encoder; there are no weights."""
    from transformers import BertConfig

    BertConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    ).save_pretrained(folder)
    return folder
