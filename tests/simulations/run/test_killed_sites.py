"""SIGKILL to a private run at random moments, and to a site between charge and reply.

The ledger never shows less than what has left, and what was charged is what is sent. The site is a
real one (``site.toml``, noise that no seed gives again), killed from inside at the exact point: one
that trained anew would answer with other noise.
"""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load

from client.app import make_app
from client.site_file import NODE_KEY
from deal_core.config.file import to_run_config
from deal_core.models import adapter_shapes
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import FILE, Ledger
from deal_core.randomness import seeded
from deal_core.wire.instruction import Instruction
from server.results import read_results
from server.strategy import start_state
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import message_of
from tests.simulations.runs import at, simulated
from tests.sizes import ENOUGH_TO_LEARN

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
def site(make_experiment, tmp_path):
    """A folder with ``site.toml``, data, and the requests ``first`` and ``second`` (rounds)."""
    (tmp_path / "site.toml").write_text(TOML.format(keep=0))
    (tmp_path / "program.py").write_text(FAULTS + PROGRAM)
    rows = [f"case {i} of the {word},{word}" for i in range(12) for word in ("skin", "bone")]
    for split in ("train", "test"):
        (tmp_path / "data" / "triage").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "data" / "triage" / f"{split}.csv"
        file.write_text("\n".join(["text,label", *rows, ""]))
    experiment = make_experiment(
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


def ask(experiment, server_round):
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


def context(experiment, site):
    config = to_run_config(experiment)
    return Context(7, 1, {NODE_KEY: str(site / "site.toml")}, RecordDict(), config)


@pytest.fixture
def live(fork, site):
    """A process of the site, from its start to its end; the exit status."""

    def run(*requests, die_at=""):
        program = str(site / "program.py")
        return fork(program, str(site), *requests, environment={"DIE_AT": die_at}).wait()

    return run


def replies(site, name):
    """All that has left in answer to a request."""
    found = []
    with (site / f"{name}.reply").open("rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def same(reply, kept):
    """Whether a reply is what the ledger has paid for, to the byte."""
    paid, arrays = load(kept), reply.array_records["lora"]
    sent = {key: (array.shape, array.numpy().tobytes()) for key, array in arrays.items()}
    return sent == {key: (array.shape, array.tobytes()) for key, array in paid.items()}


def answers(ledger):
    """All that the ledger keeps; a request's name to its answer."""
    with ledger._open() as db:
        return dict(db.execute("SELECT request, body FROM answers ORDER BY seq"))


def test_killed_after_the_charge_it_sends_what_was_charged_and_pays_once(site, live):
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
def test_where_the_process_that_stays_dies_another_sends_what_it_charged(site, monkeypatch):
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


KILLS = 20
RUN = """
import hashlib
import sys
from client.egress import check_reply
import client.app
from deal_core.config.experiment import Experiment
from simulations.engines.inprocess import run_inprocess

released = sys.argv[2]

def noted(reply, *rest):
    '''What leaves is noted, on the disk, before it leaves.'''
    if 'lora' in reply.content:
        status, site = reply.content['status'], reply.metadata.src_node_id
        with open(released, 'a') as file:
            arrays = sorted(reply.content['lora'].items())  # a file gives them in any order
            content = hashlib.sha256(b''.join(key.encode() + a.data for key, a in arrays))
            place = f"{site} {status['stage']} {status['server_round']}"
            file.write(f"{place} {content.hexdigest()}\\n")
            file.flush()
    return check_reply(reply, *rest)

client.app.check_reply = noted
run_inprocess(Experiment.model_validate_json(sys.argv[1]), lambda event: None)
"""


def released(path):
    """Places and contents of the updates that left, each once however often it left."""
    return sorted(set(path.read_text().splitlines())) if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments_the_ledger_stays_true(make_experiment, tmp_path):
    experiment = make_experiment(
        "privacy.mechanism=record",
        "privacy.noise=secure",
        "train.precision=float32",
        "train.batch_size=4",
        "federation.rounds=6",
        *ENOUGH_TO_LEARN,  # so that a round lasts long enough to be killed in
    )
    events = []
    simulated(experiment, tmp_path / "whole", events.append)
    took = events[-1]["time"] - events[0]["time"]
    whole = read_results(tmp_path / "whole").privacy
    folder, notes = tmp_path / "killed", tmp_path / "released"
    log = folder / "metrics.jsonl"
    draw, kills = random.Random(0), 0
    while not (folder / "results.json").exists():
        began, left = count(log, '"run_started"'), count(notes, "\n")
        resume = (folder / "checkpoint.safetensors").exists()
        text = at(experiment, folder, resume=resume).model_dump_json()
        process = subprocess.Popen([sys.executable, "-c", RUN, text, str(notes)])
        if kills < KILLS:
            wait(process, lambda began=began: count(log, '"run_started"') > began)
            if draw.random() < 0.6:  # mostly while updates are charged, sent and aggregated
                wait(process, lambda left=left: count(notes, "\n") > left)
            time.sleep(draw.uniform(0.0, took / 16))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.wait()
        for client in "01":
            check_ledger(folder / "sites" / client, client, notes)
    assert kills == KILLS, "the run ended before it was killed often enough"
    told = read_results(folder).privacy
    assert told == whole
    for client in "01":
        held = Ledger(folder / "sites" / client).events()
        assert len(held) == 12
        assert composed(held, held[0].delta) == whole.epsilon[client]
    assert len(released(notes)) == 24  # all rounds of both clients left, always the same bytes


def wait(process, happened):
    """Until it has happened, or the process is gone."""
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and not happened():
        time.sleep(0.01)


def count(path, word):
    return path.read_text().count(word) if path.exists() else 0


def check_ledger(site, client, notes):
    """All that left is in the ledger; nothing is in it twice."""
    if not (site / FILE).exists():
        assert not [line for line in released(notes) if line.startswith(f"{100 + int(client)} ")]
        return
    charged = [(e.stage, e.server_round) for e in Ledger(site).events()]
    assert len(set(charged)) == len(charged), json.dumps(charged)
    own = [line.split() for line in released(notes)]
    left = [(int(s), int(r)) for node, s, r, _ in own if int(node) == 100 + int(client)]
    assert len(set(left)) == len(left), "two updates of one place, and one charge"
    assert set(left) <= set(charged)
