"""What a site runs: the installed app alone, whatever a server sends; Flower's own code runs, the
server's answers are made up."""

import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from io import BytesIO

import httpx
import pytest
import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.cli.build import build_fab_from_disk
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message

from simulations.deployment.keys import make_key_pair
from simulations.deployment.site import programs
from simulations.deployment.site.programs import ClientAppExecutor, new_secret, own_app
from simulations.engines.flower import FlowerHome, free_port, program
from simulations.engines.worker_pool import assume_identity
from tests.simulations.deployment.loopback import COMMENT, changed_app

RUN, NODE = 7, 1


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_is_a_module_and_its_settings_whatever_lies_beside_it(tmp_path):
    """No keys, no data; what ``flwr run`` builds has the bytes of the app that a site runs."""
    with zipfile.ZipFile(BytesIO(own_app().content)) as bundle:
        held = {name: bundle.read(name).decode() for name in bundle.namelist()}
    assert set(held) == {"deal_app.py", "pyproject.toml", ".info/CONTENT"}
    assert sum(text.count("\n") for text in held.values()) <= 50
    copy = changed_app(tmp_path / "app", "")
    for place in ("site.key", "client/site.key", "client/data/train.jsonl", "client/app.py"):
        (copy / place).parent.mkdir(parents=True, exist_ok=True)
        (copy / place).write_bytes(make_key_pair("north").private)
    home = FlowerHome(tmp_path / "flower")
    environment = home.environment()
    command = [program("flwr"), "build", "--app", str(copy)]
    subprocess.run(command, cwd=home.empty, env=environment, check=True, timeout=120)
    (built,) = (path.read_bytes() for path in home.empty.glob("*.fab"))
    assert built == own_app().content


def message():
    with assume_identity(RUN, 0):
        made = Message(RecordDict(), dst_node_id=NODE, message_type="train")
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def pull(content, **claimed):
    """One round of the SuperNode's loop, with what a server sends and claims."""
    sent, store = message(), ObjectStoreFactory()
    objects = get_all_nested_objects(sent)
    state = NodeStateFactory(objectstore_factory=store).state()
    state.set_node_id(NODE)
    server = {
        "receive": lambda: (sent, get_object_tree(sent)),
        "get_run": lambda run_id: replace(Run.create_empty(RUN), **claimed),
        "get_fab": lambda fab_hash, run_id: Fab(fab_hash, content, {}),
        "pull_object": lambda run_id, object_id: objects[object_id].deflate(),
        "confirm_message_received": lambda run_id, message_id: None,
    }
    given = {"state": state, "object_store": store.store(), "node_config": {}}
    with assume_identity(RUN, NODE):
        pulled = programs.with_own_app(_pull_and_store_message)
        assert pulled(**given, trusted_entities=None, **server) == RUN
    return state


@pytest.mark.parametrize("kind", ["one comment more", "no bundle at all"])
def test_whatever_app_is_sent_the_installed_one_is_kept_and_run(tmp_path, kind):
    """Also where the server claims a name that leads out of the folder of apps."""
    content = b"PK\x03\x04 torn"
    if kind == "one comment more":
        content = build_fab_from_disk(changed_app(tmp_path / "app", COMMENT))
    own = own_app()
    state = pull(content, fab_id="a/b", fab_version="../../evil", fab_hash="0" * 64)
    run = state.get_run(RUN)
    assert run is not None
    assert (run.fab_id, run.fab_hash) == ("deal/federated-deal", own.hash_str)
    assert ".." not in run.fab_version
    kept = state.get_fab(own.hash_str)
    assert kept is not None
    assert kept.content == own.content
    assert state.get_fab("0" * 64) is None


@pytest.mark.parametrize("kind", [TaskType.AGENT_APP, TaskType.MODEL, TaskType.SIMULATION])
def test_a_run_of_any_kind_is_a_message_to_the_client_app(kind):
    state = pull(b"", primary_task_type=kind)
    assert [task.type for task in state.get_tasks()] == [TaskType.CLIENT_APP]


def test_the_superexec_starts_client_apps_alone():
    executor = ClientAppExecutor()
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    for kind in set(TaskType) - {TaskType.CLIENT_APP}:
        spec = ExecutionSpec(kind, "127.0.0.1:1", "token", True, None, False, None, False, 1)
        assert "ClientApps only" in str(executor.launch(spec).message)


LAUNCHING = """
import multiprocessing
import psutil
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from simulations.deployment.site import programs

def main():
    executor = programs.ClientAppExecutor()
    kind, nowhere = TaskType.CLIENT_APP, "127.0.0.1:1"
    spec = ExecutionSpec(kind, nowhere, "token-of-a-task", True, None, True, None, False, 1)
    assert str(executor.launch(spec).status) == "accepted"
    (process,) = multiprocessing.active_children()
    started = psutil.Process(process.pid)
    print(*started.cmdline(), started.parent().cmdline())

if __name__ == "__main__":
    main()
"""


def test_the_token_of_a_message_is_in_no_command_line(tmp_path):
    """Other users of the machine can read those; and modules come from where -P leaves them."""
    script = tmp_path / "launching.py"
    script.write_text(LAUNCHING)
    command = [sys.executable, "-P", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "forkserver" in done.stdout
    assert "-P" in done.stdout
    assert "token-of-a-task" not in done.stdout


def test_a_site_asks_soon_again_after_a_message_and_seldom_when_idle(monkeypatch):
    """The exchanges of a secure sum follow each other."""
    monkeypatch.setattr(programs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(programs, "IDLE_POLL_SECONDS", 0.1)
    answers = [None, RUN, None, None, RUN]
    asked = programs.with_own_app(lambda **given: answers.pop(0))
    assert [asked() for _ in range(3)] == [None, RUN, RUN]
    assert not answers


def test_the_text_of_an_error_stays():
    sent = []
    push = programs.pushing(lambda client, message, context: sent.append(message))
    with assume_identity(RUN, NODE):
        quoting = Message(Error(2, "<class 'ValueError'>:<'Mrs X'>"), reply_to=message())
        push(None, quoting, Context(RUN, NODE, {}, RecordDict(), {}))
    assert (sent[0].error.code, sent[0].error.reason) == (2, "failed")


@pytest.fixture
def interface(tmp_path):
    """Address of Flower's local interface, and the secret, while a message waits."""
    secret, port = new_secret(tmp_path), free_port()
    states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    states.state().create_task(task_type=TaskType.CLIENT_APP, run_id=7, fab_hash="f")
    plain = {"log_level": "error", "ws": "none", "http": "h11", "loop": "asyncio"}
    app = create_app(states, secret.read_bytes())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **plain))
    thread = threading.Thread(target=server.run)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    yield f"127.0.0.1:{port}", secret
    server.should_exit = True
    thread.join()


def take(address, secret):
    protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    signing = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)
    signed = [signing] if secret else []
    client = RuntimeHttpClient.from_server_address(address, True, None, interceptors=signed)
    try:
        kinds = [TaskType.CLIENT_APP]
        return client.AcquireTask(AcquireTaskRequest(supported_task_types=kinds))
    finally:
        client.close()


def test_only_who_can_read_the_secret_takes_a_message(interface):
    """Other users of a site's machine can take none from Flower's local interface."""
    address, secret = interface
    assert secret.stat().st_mode & 0o777 == 0o600
    for guess in (b"", b"0" * 64):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            take(address, guess)
    before = secret.read_bytes()
    assert take(address, before).token
    assert new_secret(secret.parent).read_bytes() != before
