"""SIGKILL to a site between the ledger's charge and the reply: what was charged is what is sent.

Real processes of a real site (``site.toml``, noise that no seed gives again), killed from inside at
the exact point. A site that trained anew would answer with other noise.
"""

from __future__ import annotations

import json
import pickle
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load

from client.app import make_app
from client.site_file import NODE_KEY
from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.models import adapter_shapes
from deal_core.privacy.ledger import Ledger
from deal_core.randomness import seeded
from deal_core.wire.instruction import Instruction
from server.strategy import start_state
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import message_of
from tests.forked import Forker

TOML = """\
[site]
name = "north"
[server]
address = "127.0.0.1:9443"
[data]
path = "data"
[data.labels]
triage = ["skin", "bone"]
[compute]
device = "cpu"
threads = 1
keep_seconds = {keep}
[policy]
mechanism = "record"
max_epsilon = 2.0
"""
FAULTS = """
import os, signal

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

point = os.environ.get("DIE_AT")
if point == "charged":  # the transaction is committed, and nothing has come after it
    import deal_core.privacy.ledger
    deal_core.privacy.ledger.Ledger._write_head = die
elif point == "released":  # the mechanism has let the answer go, the site has not kept it
    import client.state
    client.state.write_update = die
elif point == "leaving":  # the reply is made
    import client.app
    client.app.check_reply = die
"""
"""A site's process runs this first; without ``DIE_AT`` it does nothing."""
PROGRAM = """
import pickle, sys
from client.app import make_app
from simulations.engines.worker_pool import become

become(7, 1)
app = make_app()
for name in sys.argv[2:]:
    with open(f"{sys.argv[1]}/{name}", "rb") as file:
        message, context = pickle.load(file)
    with open(f"{sys.argv[1]}/{name}.reply", "ab") as file:
        pickle.dump(app(message, context).content, file)
"""
"""A site's process: answers requests that lie in a folder."""


@pytest.fixture
def site(make_experiment, tmp_path: Path) -> Path:
    """A folder with ``site.toml``, data, and the requests ``first`` and ``second`` (rounds)."""
    (tmp_path / "site.toml").write_text(TOML.format(keep=0))
    (tmp_path / "program.py").write_text(FAULTS + PROGRAM)
    rows = [f"case {i} of the {word},{word}" for i in range(12) for word in ("skin", "bone")]
    for split in ("train", "test"):
        (tmp_path / "data" / "triage").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "data" / "triage" / f"{split}.csv"
        file.write_text("\n".join(["text,label", *rows, ""]))
    experiment: Experiment = make_experiment(
        "data.source=sites",
        'data.tasks=["triage"]',
        'data.labels.triage=["skin", "bone"]',
        'federation.sites=["north"]',
        "federation.clients=1",
        "privacy.mechanism=record",
        "train.precision=float32",
        "train.batch_size=4",
        "train.max_length=8",
        "adapter.first_layer=4",
        'run.out="/srv/server/runs/run-1"',
    )
    for server_round, name in ((1, "first"), (2, "second")):
        asked = pickle.dumps((ask(experiment, server_round), context(experiment, tmp_path)))
        (tmp_path / name).write_bytes(asked)
    return tmp_path


def ask(experiment: Experiment, server_round: int) -> Message:
    """What a server asks in this round."""
    state = start_state(experiment, adapter_shapes(experiment.model, experiment.adapter))
    for factors in state.current.layers.values():
        factors.A.normal_(0.0, 0.1, generator=seeded("killed site"))
    instruction = Instruction(
        task="triage",
        stage=0,
        server_round=server_round,
        trained=("lora_B",),
        rank=state.current.rank,
        retained_rank=state.retained.rank,
    )
    with assume_identity(7, 1):
        return message_of(experiment, state, instruction)


def context(experiment: Experiment, site: Path) -> Context:
    config = to_run_config(experiment)
    return Context(7, 1, {NODE_KEY: str(site / "site.toml")}, RecordDict(), config)


@pytest.fixture
def live(fork: Forker, site: Path) -> Callable[..., int]:
    """A process of the site, from its start to its end; the exit status."""

    def run(*requests: str, die_at: str = "") -> int:
        program = str(site / "program.py")
        return fork(program, str(site), *requests, environment={"DIE_AT": die_at}).wait()

    return run


def replies(site: Path, name: str) -> list[RecordDict]:
    """All that has left in answer to a request."""
    found = []
    with (site / f"{name}.reply").open("rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def same(reply: RecordDict, kept: bytes) -> bool:
    """Whether a reply is what the ledger has paid for, to the byte."""
    paid, arrays = load(kept), reply.array_records["lora"]
    sent = {key: (array.shape, array.numpy().tobytes()) for key, array in arrays.items()}
    return sent == {key: (array.shape, array.tobytes()) for key, array in paid.items()}


def answers(ledger: Ledger) -> dict[str, bytes]:
    """All that the ledger keeps; a request's name to its answer."""
    with ledger._open() as db:
        return dict(db.execute("SELECT request, body FROM answers ORDER BY seq"))


def test_killed_after_the_charge_it_sends_what_was_charged_and_pays_once(
    site: Path, live: Callable[..., int]
) -> None:
    ledger, run = Ledger(site / "state"), site / "state" / "runs" / "run-1"
    assert live("first", die_at="charged") == -signal.SIGKILL
    # killed within the charge, behind its commit: the second file is one entry behind
    assert json.loads(ledger.head.read_text())["seq"] == 0
    (name, kept), *others = answers(ledger).items()
    assert not others
    charged = ledger.entries()
    assert [(e.event.server_round, e.event.simulation_only) for e in charged] == [(1, False)]

    assert live("first", die_at="released") == -signal.SIGKILL
    assert not list(run.glob("update-*"))
    assert live("first", die_at="leaving") == -signal.SIGKILL
    assert len(list(run.glob("update-*.safetensors"))) == 1
    assert not (site / "first.reply").read_bytes()  # three lives, and nothing has left

    assert live("first", "first", "second") == 0
    once, again = replies(site, "first")
    assert same(once, kept)
    assert same(again, kept)
    assert answers(ledger)[name] == kept
    entries = ledger.entries()  # the whole chain is checked
    assert entries[:1] == charged
    assert [e.event.server_round for e in entries] == [1, 2]
    (later,) = replies(site, "second")
    assert not same(later, kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it outlives us
def test_where_the_process_that_stays_dies_another_sends_what_it_charged(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The light process, which Flower has started, lives: it takes over within the request."""
    (site / "site.toml").write_text(TOML.format(keep=60))
    (site / "sitecustomize.py").write_text(FAULTS)  # Python imports it when it starts
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("DIE_AT", "charged")
    with (site / "first").open("rb") as file:
        message, where = pickle.load(file)
    try:
        with assume_identity(7, 1):
            reply = make_app()(message, where)
    finally:
        folder = str(site / "state" / "worker")
        left = [p for p in psutil.process_iter(["cmdline"]) if folder in str(p.info)]
        for process in left:
            process.kill()
    assert left == []  # it has died, as it was to
    ledger = Ledger(site / "state")
    (kept,) = answers(ledger).values()
    assert len(ledger.entries()) == 1
    assert same(reply.content, kept)
