"""A real site: a folder with data, ``site.toml`` and ledger, and a server that only sends messages.

The app, the model, the files and the ledger are real; only the wire between them is not there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_app
from client.gate import authorize
from client.identity import Client, ClientRequest
from client.local_training import local_update
from client.resident_worker import INSIDE
from client.runtime import ClientRuntime
from client.site_file import NODE_KEY, read_site
from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.state import State
from deal_core.models import adapter_shapes
from deal_core.privacy.events import LedgerEvent
from deal_core.privacy.interface import LocalUpdate
from deal_core.privacy.ledger import Ledger
from deal_core.randomness import seeded
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import LATE_SECONDS
from server.strategy import start_state
from server.wire import packed
from simulations.engines.worker_pool import assume_identity
from tests.run_configs import placed
from tests.sizes import TWO_LAYERS

Row = tuple[str, str]
"""Text and label."""
LABELS: Mapping[str, tuple[str, ...]] = {
    "laboratory": ("Pathology", "Pharmacology"),
    "surgery": ("Radiology", "Surgery"),
    "skin": ("Eczema", "Psoriasis"),
}


def rows(task: str, count: int = 40) -> list[Row]:
    """Short texts that differ, with both labels in turn."""
    labels = LABELS[task]
    return [(f"{task} case number {n} seen on ward {n % 7}", labels[n % 2]) for n in range(count)]


@dataclass(frozen=True)
class RealSite:
    """Attributes: ``folder``; ``policy``, lines of ``[policy]``; ``data``, rows of each task, the
    same for training and test; ``each``, records of a patient, of whom a column ``patient`` has the
    number; 0: there is no such column."""

    folder: Path
    policy: str = 'mechanism = "record"\nmax_epsilon = 1.0\n'
    data: Mapping[str, Sequence[Row]] = field(default_factory=lambda: {t: rows(t) for t in LABELS})
    declared: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(LABELS))
    data_lines: str = ""
    each: int = 0

    def __post_init__(self) -> None:
        for task, examples in self.data.items():
            place = self.folder / "data" / task
            place.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(
                    {"text": text, "label": label, "id": text}
                    | ({"patient": f"p{row // self.each}"} if self.each else {})
                )
                for row, (text, label) in enumerate(examples)
            ]
            for split in ("train", "test"):
                (place / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        labels = [f"{task} = {json.dumps(list(names))}" for task, names in self.declared.items()]
        ids = 'id_column = "id"\n' if "disjoint_tasks" in self.policy else ""
        table = "[data.labels]\n" + "\n".join(labels)
        (self.folder / "site.toml").write_text(
            '[site]\nname = "north"\n[server]\naddress = "127.0.0.1:1"\n'
            f'[data]\npath = "data"\n{ids}{self.data_lines}{table}\n'
            f'[compute]\ndevice = "cpu"\nthreads = 1\n[policy]\n'
            f"{TWO_LAYERS.removeprefix('adapter.')}\n{self.policy}"
        )

    @property
    def ledger(self) -> Ledger:
        """The site's own."""
        return Ledger(self.folder / "state")

    @property
    def events(self) -> list[LedgerEvent]:
        """What it holds."""
        return self.ledger.events()

    def log(self) -> list[dict[str, Any]]:
        """The site's log."""
        path = self.folder / "state" / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def client(self, experiment: Experiment) -> Client:
        """The site as one request of an experiment finds it."""
        return Client(0, self.folder, experiment, read_site(self.folder / "site.toml"))

    def update(
        self,
        experiment: Experiment,
        instruction: Instruction,
        state: State | None = None,
        sites: int = 0,
        runtime: ClientRuntime | None = None,
    ) -> LocalUpdate:
        """What it makes of one request, without Flower."""
        client = self.client(experiment)
        runtime = runtime or ClientRuntime(client.experiment, whole=True)
        phase, state = runtime.phases[instruction.phase], state or start(experiment)
        request = ClientRequest(client, runtime, instruction, phase, state, "x")
        authorization = authorize(request.asked(), lambda: runtime.mechanism)
        return local_update(request, authorization, sites)

    def answer(
        self,
        experiment: Experiment,
        instruction: Mapping[str, Any],
        state: State | None = None,
        run: str = "run-1",
        kind: str = "train",
        app: ClientApp | None = None,
    ) -> Message:
        """Send one request to the real app, or to ``app``; return what leaves."""
        state = state or start(experiment)
        config = placed(experiment, f"/srv/runs/{run}")
        node = {NODE_KEY: str(self.folder / "site.toml"), INSIDE: True}
        with assume_identity(7, 1):
            message = message_of(experiment, state, asking(state), kind)
            record = message.content.config_records["instruction"]
            for key, value in instruction.items():
                record[key] = value
            return (app or make_app())(message, Context(7, 1, node, RecordDict(), config))


def message_of(
    experiment: Experiment, state: State, instruction: Instruction, kind: str = "", node: int = 1
) -> Message:
    """A server's request about a state."""
    sent = packed(experiment, state, instruction)
    retained = {"retained_digest": sent.digest, "retained_rows": sent.retained_rank}
    asked = ConfigRecord(instruction.model_copy(update=retained).to_config())
    content = RecordDict({**sent.records, "instruction": asked})
    return Message(content, node, kind or sent.kind, ttl=2 * LATE_SECONDS)


def asking(state: State) -> Instruction:
    """An instruction that fits the state; attacks change its fields."""
    return Instruction(
        task="surgery",
        stage=0,
        server_round=1,
        trained=("lora_B",),
        rank=state.current.rank,
        retained_rank=state.retained.rank,
    )


_shapes = cache(adapter_shapes)


def start(experiment: Experiment, loud: float = 0.0, word: int = 0) -> State:
    """What a server sends: ``A`` random, ``B`` zero; ``loud`` makes the retained adapter large."""
    begun = start_state(experiment, _shapes(experiment.model, experiment.adapter))
    generator, layers = seeded("guard"), {}
    for name, factors in begun.current.layers.items():
        a = factors.A.clone().normal_(0.0, 0.1, generator=generator)
        layers[name] = LoraFactors(a, factors.B)
    retained = begun.retained
    if loud:
        retained = Adapter(
            {
                name: LoraFactors(torch.full_like(f.A, loud), torch.full_like(f.B, loud))
                for name, f in retained.layers.items()
            },
            retained.scaling,
        )
    return State(Adapter(layers, begun.current.scaling), retained)


def asked(*overrides: str, labels: Mapping[str, Sequence[str]] = LABELS) -> Experiment:
    """An experiment of two registered sites, small enough to be answered in a moment."""
    given = [
        "data.source=sites",
        'federation.sites=["north", "south"]',
        "federation.rounds=2",
        "train.batch_size=8",
        "train.max_length=8",
        "train.learning_rate=0.01",
        "adapter.retained_rank=8",
        "run.engine=deployment",
        "privacy.mechanism=record",
        *overrides,
    ]
    tables = apply_overrides({}, given)
    tables["data"] = {**tables["data"], "labels": {t: list(names) for t, names in labels.items()}}
    return parse_experiment(tables, "test")


def small(*overrides: str, labels: Mapping[str, Sequence[str]] = LABELS) -> Experiment:
    """The same with two layers adapted, where it does not matter how many are."""
    return asked(TWO_LAYERS, *overrides, labels=labels)


def code(reply: Message) -> str:
    """How the request ended."""
    return str(reply.content.config_records["status"]["code"])


def update(reply: Message) -> torch.Tensor:
    """All values of an update as one vector."""
    record = reply.content.array_records["lora"]
    return torch.cat([torch.tensor(record[key].numpy()).flatten() for key in sorted(record)])
