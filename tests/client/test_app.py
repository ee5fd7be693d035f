"""What Flower does with the app on its way to a client."""

import subprocess
import sys

import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from ray import cloudpickle

import client.runtime
from client.app import TOOK, make_app
from client.resident_worker import INSIDE
from client.site_file import NODE_KEY
from deal_core.config.experiment import Experiment, RunConfig
from deal_core.wire.records import LATE_SECONDS
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import RealSite
from tests.run_configs import placed

HEAVY = {"torch", "transformers", "peft", "pandas", "scipy", "safetensors"}


def test_messages_to_one_process_share_a_workbench(monkeypatch, tmp_path):
    """Flower pickles the app with every message: what it carries is made anew each time."""
    made = []
    original = client.runtime.ClientRuntime
    monkeypatch.setattr(
        client.runtime, "ClientRuntime", lambda config: made.append(config) or original(config)
    )
    sent = cloudpickle.dumps(make_app())
    experiment = Experiment(run=RunConfig(seed=12345))
    for client_number, out in enumerate(("one", "another")):
        run_config = placed(experiment, tmp_path / out)
        context = Context(1, 1, {"partition-id": client_number}, RecordDict(), run_config)
        with assume_identity(1, 1):
            request = Message(RecordDict(), 1, MessageType.TRAIN)
            reply = cloudpickle.loads(sent)(request, context)
        assert reply.content["status"]["code"] == "refused"  # an empty request: nothing is loaded
    assert len(made) == 1


@pytest.mark.parametrize(
    ("left", "event", "code"), [(-31.0, "too_late", "failed"), (20.0, "may_be_late", "version")]
)
def test_a_site_looks_at_the_deadline_before_it_works(left, event, code, tmp_path, monkeypatch):
    """After it nothing is begun that would be charged; a round that may not fit is told before."""
    site = RealSite(tmp_path)
    monkeypatch.setitem(TOOK, MessageType.TRAIN, 60.0)
    context = Context(1, 1, {NODE_KEY: str(tmp_path / "site.toml"), INSIDE: True}, RecordDict(), {})
    with assume_identity(1, 1):
        request = Message(RecordDict(), 1, MessageType.TRAIN, ttl=left + 100 + LATE_SECONDS)
    request.metadata.created_at -= 100
    reply = make_app()(request, context)
    assert reply.content["status"]["code"] == code
    events = [line["event"] for line in site.log()]
    assert events[0] == event
    assert ("arrived" in events) == (left > 0)


def test_the_process_that_flower_starts_for_every_message_stays_light():
    """Torch alone takes longer than all the rest; the process that stays has it."""
    parts = "client.app, client.secure_exchanges"  # a secure sum has three messages a round more
    code = f"import {parts}, sys; sys.exit(', '.join({HEAVY!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
