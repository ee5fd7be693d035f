"""What Flower does with the app on its way to a client."""

import subprocess
import sys

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from client.app import TOOK, make_app
from client.resident_worker import INSIDE
from client.site_file import NODE_KEY
from deal_core.wire.records import LATE_SECONDS
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import RealSite

HEAVY = {"torch", "transformers", "peft", "pandas", "scipy", "safetensors"}


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
    parts = "client.app, client.secure_legs"  # a secure sum has three messages a round more
    code = f"import {parts}, sys; sys.exit(', '.join({HEAVY!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
