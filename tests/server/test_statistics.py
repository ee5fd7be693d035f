"""Rounds of statistics through the real server: a hostile reply costs its sender the round, and the
heads are those of the others, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import normalize

from client import wire
from client.distilled_store import DistilledStore
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import flatten
from deal_core.data import open_source
from deal_core.lora.payload import SUMS
from deal_core.methods import EmbeddedTask, make_method, phases_of, statistics_of
from deal_core.models import adapter_shapes
from deal_core.privacy.interface import LocalUpdate
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.wire.sums import pack_sums
from server import reply_collection as rounds
from server.checkpoint import Checkpoint, load_checkpoint
from server.folder import RunFolder
from server.run import run
from server.statistics.replies import SumsReplies, totals, weights
from simulations.engines.flower_identity import assume_identity
from simulations.engines.inprocess import InProcessGrid
from tests.server.fuzz_grid import FuzzGrid, counts, lost, tiny_model
from tests.server.spoil import TEXT, Mutation, figures, only_text, placed, said

CLIENTS, SIZE, TASKS = 4, 16, ("laboratory", "surgery")
GIVEN = {str(number): 20.0 + number for number in range(CLIENTS)}
"""Records of each client, of any task."""


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waiting takes no time."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + 1e4 * seconds),
    )
    monkeypatch.setattr(rounds, "time", clock)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def experiment(folder: Path, model: Path, method: str, dtype: str = "float32") -> Experiment:
    return Experiment.model_validate(
        {
            "model": {"name": str(model)},
            "adapter": {"target_modules": ("query",)},
            "data": {"tasks": TASKS},
            "method": {"name": method, "linear_probe": {"rounds": 3}},
            "federation": {"clients": CLIENTS, "rounds": 1, "quorum": 0.05},
            "wire": {"dtype": dtype},
            "run": {"out": str(folder)},
        }
    )


def summing_app(config: Experiment) -> ClientApp:
    """Clients that read, add up and write as the real ones do; their embeddings are drawn."""
    app = ClientApp()
    source = open_source(config.data)
    labels = {task: source.load(task).labels for task in TASKS}
    phases = phases_of(make_method(config.method, config.adapter))
    bench = SimpleNamespace(
        experiment=config,
        shapes=adapter_shapes(config.model, config.adapter),
        latest=Cache(),
        phase=phases.__getitem__,
        statistics=statistics_of(make_method(config.method, config.adapter)),
        tasks=TASKS,
        labels=labels.__getitem__,
    )

    def store(number: int) -> DistilledStore:
        return DistilledStore(Path(config.run.out) / "sites" / str(number))

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        site = ConfigRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"site": site}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        state, instruction = wire.read_request(message, bench, store(number))
        statistics = phases[instruction.phase].statistics
        tasks, sums = instruction.tasks or (instruction.task,), []
        for task in tasks:
            generator = seeded("embeddings", number, task)
            x = normalize(torch.randn(20 + number, SIZE, generator=generator), dim=1)
            y = torch.randint(len(labels[task]), (len(x),), generator=generator)
            head = state.heads.get(task)
            sums.append(statistics.collect(EmbeddedTask(x, y, len(labels[task]), head)))
        form = statistics.at(config.wire.dtype)
        figures = {"num_examples": len(tasks) * (20 + number), "seconds": 0.1}
        update = LocalUpdate(pack_sums([form.pack(each) for each in sums], form.codes), figures)
        return wire.update_reply(message, update, instruction, None, SUMS)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        _, instruction = wire.read_request(message, bench, store(number))
        return wire.evaluation_reply(message, counts(len(instruction.tasks)))

    return app


def played(
    config: Experiment, spoil: Callable[[str, Message], list[Message]]
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    inner = InProcessGrid(summing_app(config), flatten(config), CLIENTS)
    shapes = adapter_shapes(config.model, config.adapter)
    folder = RunFolder(Path(config.run.out))

    def tamper(client: str, reply: Message) -> list[Message]:
        return spoil(client, reply) if SUMS in reply.content else [reply]

    with assume_identity(1, 1):
        run(FuzzGrid(inner, shapes, folder, tamper), config)  # type: ignore[arg-type]
    log = folder.metrics.read_text("utf-8")
    assert TEXT not in log
    events = [json.loads(line) for line in log.splitlines()]
    return load_checkpoint(folder.checkpoint, shapes), events


def on(change: Callable[[np.ndarray], np.ndarray], end: str = "") -> Mutation:
    """Replace every array whose name ends so; without a name the first."""

    def mutate(reply: Message, generator: torch.Generator) -> None:
        record = reply.content[SUMS]
        keys = [key for key in record if key.endswith(end)] if end else [next(iter(record))]
        for key in keys:
            record[key] = Array(np.ascontiguousarray(change(record[key].numpy())))

    return mutate


def renamed(name: str) -> Mutation:
    def mutate(reply: Message, generator: torch.Generator) -> None:
        record = reply.content[SUMS]
        record[name] = record.pop(next(iter(record)))

    return mutate


def as_update(reply: Message, generator: torch.Generator) -> None:
    reply.content["lora"] = reply.content[SUMS]
    del reply.content[SUMS]


ANY: dict[str, Mutation] = {
    "NaN": on(lambda a: np.full_like(a, np.nan)),
    "Inf": on(lambda a: np.full_like(a, np.inf), "sum"),
    "largest float": on(lambda a: np.full_like(a, 3e38)),
    "float64": on(lambda a: a.astype(np.float64)),
    "integers": on(lambda a: a.astype(np.int64), "count"),
    "transposed": on(lambda a: a.T[..., None]),
    "one row more": on(lambda a: np.concatenate([a, a[:1]])),
    "empty": on(lambda a: a[:0]),
    "flat": on(lambda a: a.reshape(-1)[:1]),
    "negative count": on(lambda a: -a, "count"),
    "half an example": on(lambda a: a + 0.5, "count"),
    "vast count": on(lambda a: a * 1e9, "count"),
    "extra key": lambda reply, g: reply.content[SUMS].__setitem__("0.texts", Array(np.zeros(3))),
    "key of another task": renamed("1.count"),
    "key without a task": renamed("count"),
    "in the record of an update": as_update,
    "empty record": placed(SUMS, ArrayRecord),
    "record of another kind": placed(SUMS, lambda: ConfigRecord({"question": TEXT})),
    "an adapter beside": placed("lora", lambda: ArrayRecord({"x": Array(np.zeros(2))})),
    "wrong round": said(server_round=77),
    "wrong phase": said(phase="consolidate"),
    "no weight": figures(num_examples=None),
    "extra figure": figures(age=17),
    "only text": only_text,
}
OF_SUMS: dict[str, Mutation] = {
    "long sums": on(lambda a: a * 3, "sum"),
    "Gram of more": on(lambda a: a * 2, "gram"),
    "negative Gram": on(lambda a: -a, "gram"),
    "Gram of nothing": on(lambda a: a * 0, "gram"),
}
OF_CODES: dict[str, Mutation] = {
    "code out of range": on(lambda a: np.full_like(a, -128), "scatter"),
    "scale that is not its row's": on(lambda a: a // 2, "sum"),
    "long sums": on(lambda a: a * 3, "sum.scale"),
    "scatter of more": on(lambda a: a * 2, "scatter.diagonal"),
    "scatter of less": on(lambda a: a * np.float32(0.9), "scatter.diagonal"),
    "correlations turned round": on(lambda a: -a, "scatter"),
    "all correlations -1": on(lambda a: np.full_like(a, -127), "scatter"),
    "none of the count": on(lambda a: a * 0, "count"),
    "sums in float32": on(lambda a: a.astype(np.float32), "sum"),
}
OF_GRADIENTS: dict[str, Mutation] = {
    "long gradient": on(lambda a: a * 1e6, "gradient"),
    "unbalanced gradient": on(lambda a: a + 1.0, "gradient"),
}


def in_the_last_round(method: str, mutation: Mutation) -> Callable[[str, Message], list[Message]]:
    """Client 2 is bad whenever there is something to spoil in its reply."""

    def spoil(client: str, reply: Message) -> list[Message]:
        if client == "2":
            mutation(reply, seeded("hostile"))
        return [reply]

    return spoil


def without(client: str, reply: Message) -> list[Message]:
    return lost(reply) if client == "2" else [reply]


CASES = [("prototype", kind) for kind in (*ANY, *OF_SUMS)] + [
    ("linear-probe", kind) for kind in ("NaN", "vast count", "half an example", "wrong phase")
]


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """What the server makes of the others, by method and wire."""
    made: dict[tuple[str, str], Checkpoint] = {}

    def of(method: str, dtype: str = "float32") -> Checkpoint:
        if (method, dtype) not in made:
            config = experiment(tmp_path_factory.mktemp(method), model, method, dtype)
            made[method, dtype] = played(config, without)[0]
        return made[method, dtype]

    return of


def same(one: Checkpoint, two: Checkpoint) -> bool:
    first, second = one.state.heads, two.state.heads
    return first.keys() == second.keys() and all(torch.equal(first[t], second[t]) for t in first)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_what_is_refused_leaves_the_heads_that_there_are_without_its_sender(
    tmp_path, model, expected, method, kind
):
    mutation = (ANY | OF_SUMS)[kind]
    config = experiment(tmp_path, model, method)
    checkpoint, events = played(config, in_the_last_round(method, mutation))
    assert same(checkpoint, expected(method))
    failed = [event for event in events if event["event"] == "client_failed"]
    assert {event["client"] for event in failed} == {"2"}
    assert all(0 < len(event["reason"]) < 500 for event in failed)
    assert not [event for event in events if event["event"] == "round_lost"]
    assert "2" not in checkpoint.history.collected["surgery"]


@pytest.mark.parametrize("kind", OF_CODES)
def test_rounded_sums_that_no_data_can_have_are_refused(tmp_path, model, expected, kind):
    config = experiment(tmp_path, model, "prototype", "int8")
    checkpoint, events = played(config, in_the_last_round("prototype", OF_CODES[kind]))
    assert same(checkpoint, expected("prototype", "int8"))
    assert {e["client"] for e in events if e["event"] == "client_failed"} == {"2"}


def test_heads_of_rounded_sums_answer_as_those_of_exact_ones(tmp_path, model):
    """And cost less, of few entries too; gradients, and the sums beside them, are not rounded."""
    heads, bytes_up = {}, {}
    for dtype in ("float32", "bfloat16", "int8"):
        config = experiment(tmp_path / dtype, model, "prototype", dtype)
        checkpoint, events = played(config, lambda client, reply: [reply])
        heads[dtype] = torch.cat(list(checkpoint.state.heads.values())).double()
        bytes_up[dtype] = sum(e["bytes_up"] for e in events if e["event"] == "round_finished")
        assert not [e for e in events if e["event"] == "client_failed"]
    x = normalize(torch.randn(2000, SIZE, generator=seeded("x")), dim=1).double()
    two = {dtype: head.transpose(0, 1) for dtype, head in heads.items()}
    scores = {d: x @ head[..., :SIZE].mT + head[..., SIZE][:, None] for d, head in two.items()}
    spread = float(scores["float32"].std())
    assert 0 < float((scores["int8"] - scores["float32"]).std()) < 0.05 * spread
    assert torch.equal(heads["bfloat16"], heads["float32"])
    assert bytes_up["int8"] < 0.95 * bytes_up["float32"] == 0.95 * bytes_up["bfloat16"]


def test_the_sums_of_a_linear_probe_are_exact_whatever_the_wire(tmp_path, model):
    config = experiment(tmp_path, model, "linear-probe", "int8")
    checkpoint, _ = played(config, lambda client, reply: [reply])
    exact, _ = played(experiment(tmp_path / "x", model, "linear-probe"), lambda c, reply: [reply])
    assert same(checkpoint, exact)


@pytest.mark.parametrize("bad", [{"2"}, {"1", "2", "3"}])
def test_jointly_a_client_that_sends_sums_of_nothing_is_refused_and_no_round_is_lost(
    tmp_path, model, bad
):
    def spoil(client: str, reply: Message) -> list[Message]:
        if client in bad:
            on(lambda a: a * 0, "count")(reply, seeded("x"))
            on(lambda a: a * 0, "sum")(reply, seeded("x"))
            on(lambda a: a * 0, "gram")(reply, seeded("x"))
        return [reply]

    config = experiment(tmp_path, model, "prototype")
    stream = config.stream.model_copy(update={"schedule": "joint"})
    quorum = config.federation.model_copy(update={"quorum": 0.1})
    joint = config.model_copy(update={"stream": stream, "federation": quorum})
    checkpoint, events = played(joint, spoil)
    failed = [event for event in events if event["event"] == "client_failed"]
    assert {event["client"] for event in failed} == bad
    assert not [event for event in events if event["event"] == "round_lost"]
    assert checkpoint.state.heads.keys() == set(TASKS)


@pytest.mark.parametrize("kind", OF_GRADIENTS)
def test_a_gradient_that_no_data_can_have_is_refused(tmp_path, model, kind):
    def spoil(client: str, reply: Message) -> list[Message]:
        if client == "2" and "0.gradient" in reply.content[SUMS]:
            OF_GRADIENTS[kind](reply, seeded("hostile"))
        return [reply]

    def absent(client: str, reply: Message) -> list[Message]:
        gone = client == "2" and "0.gradient" in reply.content[SUMS]
        return lost(reply) if gone else [reply]

    hostile, events = played(experiment(tmp_path / "a", model, "linear-probe"), spoil)
    assert same(hostile, played(experiment(tmp_path / "b", model, "linear-probe"), absent)[0])
    assert [e["client"] for e in events if e["event"] == "client_failed"] == ["2"] * 6


@pytest.mark.parametrize("method", ["prototype", "linear-probe"])
def test_a_good_run_has_a_head_for_each_task_and_a_checkpoint_with_all_of_it(
    tmp_path, model, expected, method
):
    checkpoint, events = played(experiment(tmp_path, model, method), lambda c, reply: [reply])
    assert not [event for event in events if event["event"] == "client_failed"]
    assert not same(checkpoint, expected(method))
    shape = (4, 2, SIZE + 1) if method == "prototype" else (4, SIZE + 1)
    heads = checkpoint.state.heads
    assert {task: tuple(head.shape) for task, head in heads.items()} == dict.fromkeys(TASKS, shape)
    assert all(head.dtype == torch.float32 for head in checkpoint.state.heads.values())
    assert all(part.dtype == torch.float64 for part in checkpoint.state.sums.values())
    assert checkpoint.history.collected == dict.fromkeys(TASKS, GIVEN)


def test_sums_that_are_given_once_are_asked_of_all_however_few_a_round_samples(tmp_path, model):
    config = experiment(tmp_path, model, "prototype")
    few = config.federation.model_copy(update={"clients_per_round": 1})
    sampled = config.model_copy(update={"federation": few})
    checkpoint, events = played(sampled, lambda client, reply: [reply])
    assert checkpoint.history.collected == dict.fromkeys(TASKS, GIVEN)
    assert sum(event["event"] == "client_finished" for event in events) == CLIENTS * len(TASKS)


def test_who_was_silent_until_the_deadline_is_not_waited_for_twice(tmp_path, model):
    """Nobody else is kept from being asked again by it."""

    def spoil(client: str, reply: Message) -> list[Message]:
        return [] if client == "1" else lost(reply) if client == "2" else [reply]

    _, events = played(experiment(tmp_path, model, "prototype"), spoil)
    assert [e["client"] for e in events if e["event"] == "asked_again"] == ["2"] * len(TASKS)


@pytest.mark.parametrize("kind", ["lost", "NaN"])
def test_sums_that_were_lost_are_asked_for_once_more(tmp_path, model, kind):
    """Else the labels that client 2 alone has would never be known."""
    asked: list[Message] = []

    def spoil(client: str, reply: Message) -> list[Message]:
        if client == "2":
            asked.append(reply)
            if len(asked) == 1 and kind == "lost":
                return lost(reply)
            if len(asked) == 1:
                ANY[kind](reply, seeded("x"))
        return [reply]

    whole, _ = played(experiment(tmp_path / "a", model, "prototype"), lambda c, reply: [reply])
    checkpoint, events = played(experiment(tmp_path / "b", model, "prototype"), spoil)
    assert len(asked) == 3  # twice for one task, once for the other
    assert [event["client"] for event in events if event["event"] == "asked_again"] == ["2"]
    assert checkpoint.history.collected == dict.fromkeys(TASKS, GIVEN)
    for name, part in whole.state.sums.items():
        assert torch.equal(checkpoint.state.sums[name], part)


def test_who_fails_again_costs_itself_its_sums_and_no_later_round(tmp_path, model):
    """Of those that have a task enough have given their sums, though none of those asked last."""
    config = experiment(tmp_path, model, "prototype")
    more = config.federation.model_copy(update={"rounds": 3, "quorum": 0.5})
    checkpoint, events = played(config.model_copy(update={"federation": more}), without)
    assert [e["client"] for e in events if e["event"] == "asked_again"] == ["2"] * 3 * len(TASKS)
    assert checkpoint.state.heads.keys() == set(TASKS)
    assert not [e for e in events if e["event"] == "run_stopped"]


def test_who_gives_its_sums_later_than_others_is_compared_with_them(tmp_path, model):
    """It could claim any number of records, if it were compared with those alone that come as
    late."""
    seen: list[Message] = []

    def late(client: str, reply: Message) -> list[Message]:
        if client != "2":
            return [reply]
        seen.append(reply)
        if len(seen) in (1, 2):
            return lost(reply)
        for end in ("count", "sum", "gram"):
            on(lambda a: a * 1e5, end)(reply, seeded("x"))
        return [reply]

    config = experiment(tmp_path, model, "prototype")
    more = config.federation.model_copy(update={"rounds": 2})
    checkpoint, events = played(config.model_copy(update={"federation": more}), late)
    others = 20 + 21 + 23
    claimed = float(checkpoint.state.sums["count/laboratory"].sum()) - others
    assert claimed == pytest.approx(50.0 * 21)  # the median of 20, 21 and 23
    cuts = [e for e in events if e["event"] == "weight_cut"]
    assert [cut["client"] for cut in cuts] == ["2", "2"]
    assert cuts[0]["weight"] == pytest.approx(50.0 * 21)


def replies(**examples: float) -> SumsReplies:
    found = SumsReplies()
    for name, n in examples.items():
        found.sums.setdefault("skin", {})[name[1:]] = {"count": torch.tensor([n]).double()}
        found.examples[name[1:]] = n
    return found


def test_whoever_claims_vastly_more_records_is_scaled_down():
    gathered = replies(c0=10.0, c1=20.0, c2=30.0, c3=10_000.0)
    clients = ["0", "1", "2", "3"]
    for cap, count in ((50.0, 60.0 + 50 * 20.0), (0.0, 10_060.0)):
        factors = weights(gathered.examples, cap)
        assert float(totals(gathered, clients, factors)["skin"]["count"]) == count
    assert weights({"0": 10.0}, 50.0) == {"0": 1.0}
    assert weights({"0": 10_000.0}, 50.0, [10.0, 20.0, 30.0]) == {"0": 0.1}


def test_sums_are_added_in_one_order_whoever_answers_first():
    numbers = {"c0": 0.1, "c1": 1e16, "c2": -1e16, "c3": 0.3}
    backwards = replies(**dict(reversed(numbers.items())))
    clients = ["0", "1", "2", "3"]
    ones = dict.fromkeys(clients, 1.0)
    found = totals(backwards, clients, ones)["skin"]["count"]
    assert torch.equal(found, totals(replies(**numbers), clients, ones)["skin"]["count"])
