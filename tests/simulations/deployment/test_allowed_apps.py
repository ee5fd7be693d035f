"""Which apps get past the launcher: Flower's own code runs, the server's answers are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.cli.build import build_fab_from_disk
from flwr.cli.install import install_from_fab
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.superexec.executor import ExecutionSpec
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from client.site_log import LOG, SiteLog
from simulations.deployment.site import clientapp, supernode
from simulations.deployment.site.clientapp import (
    REFUSAL,
    AppNotAllowed,
    digest_of,
    own_app,
    own_digest,
)
from simulations.deployment.site.superexec import ClientAppExecutor
from simulations.engines.flower_identity import assume_identity
from tests.simulations.deployment.pushed_app import COMMENT, changed_app

RUN, NODE = 7, 1
OWN = own_digest()


class Server:
    """What a SuperNode asks, answered with one message and one app."""

    def __init__(self, content: bytes, kind: str = TaskType.SERVER_APP) -> None:
        with assume_identity(RUN, 0):
            self.message = Message(RecordDict(), dst_node_id=NODE, message_type="train")
        self.message.metadata.__dict__["_message_id"] = self.message.object_id
        self.content, self.kind = content, kind
        self.claimed = own_digest()  # whatever the bytes are

    def callbacks(self) -> dict[str, Any]:
        objects = get_all_nested_objects(self.message)
        run = replace(Run.create_empty(RUN), fab_hash=self.claimed, primary_task_type=self.kind)
        return {
            "receive": lambda: (self.message, get_object_tree(self.message)),
            "get_run": lambda run_id: run,
            "get_fab": lambda fab_hash, run_id: Fab(self.claimed, self.content, {}),
            "pull_object": lambda run_id, object_id: objects[object_id].deflate(),
            "confirm_message_received": lambda run_id, message_id: None,
        }


def pull(server: Server, allowed: str, folder: Path) -> tuple[int | None, NodeState]:
    """One round of the SuperNode's loop, behind the gate."""
    store = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=store).state()
    state.set_node_id(NODE)
    given = {"state": state, "object_store": store.store(), "node_config": {}}
    gated = supernode.gated(supernode.internal._pull_and_store_message, allowed, SiteLog(folder))
    with assume_identity(RUN, NODE):
        return gated(**given, trusted_entities=None, **server.callbacks()), state


def refusal(state: NodeState) -> Error:
    (reply,) = state.get_messages_legacy(is_reply=True)
    return reply.error


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_an_allowed_app_gets_in(tmp_path: Path) -> None:
    run, state = pull(Server(own_app()), OWN, tmp_path)
    assert run == RUN
    assert state.get_run(RUN) is not None
    assert [task.type for task in state.get_tasks()] == [TaskType.CLIENT_APP]
    assert not (tmp_path / LOG).exists()


@pytest.mark.parametrize("kind", ["one comment more", "no bundle at all"])
def test_of_another_app_nothing_is_kept_and_one_sentence_leaves(tmp_path: Path, kind: str) -> None:
    """The server claims the hash of an allowed one; what is no bundle would be opened by Flower."""
    content = b"PK\x03\x04 torn"
    if kind == "one comment more":
        content = build_fab_from_disk(changed_app(tmp_path / "app", COMMENT))
    run, state = pull(Server(content), OWN, tmp_path)
    assert run == RUN
    error = refusal(state)
    assert (error.code, error.reason) == (ErrorCode.INVALID_FAB, REFUSAL)
    assert state.get_run(RUN) is None
    assert state.get_fab(own_digest()) is None
    assert list(state.get_tasks()) == []
    (event,) = logged(tmp_path)
    assert (event["event"], event["app"]) == ("app_refused", digest_of(content))
    assert "deal submit" in event["cure"]


def test_every_message_of_a_refused_app_is_refused(tmp_path: Path) -> None:
    server = Server(b"other")
    for _ in range(2):
        _, state = pull(server, OWN, tmp_path)
        assert refusal(state).reason == REFUSAL
    assert len(logged(tmp_path)) == 2


@pytest.mark.parametrize("kind", [TaskType.AGENT_APP, TaskType.MODEL, TaskType.SIMULATION])
def test_a_run_of_another_kind_is_refused_though_its_app_is_allowed(
    tmp_path: Path, kind: TaskType
) -> None:
    _, state = pull(Server(own_app(), kind), OWN, tmp_path)
    assert refusal(state).reason == REFUSAL
    assert list(state.get_tasks()) == []


def test_the_superexec_starts_client_apps_alone() -> None:
    executor = ClientAppExecutor(OWN)
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    for kind in set(TaskType) - {TaskType.CLIENT_APP}:
        spec = ExecutionSpec(kind, "127.0.0.1:1", "token", True, None, False, None, False, 1)
        assert "ClientApps only" in str(executor.launch(spec).message)
    spec = ExecutionSpec(
        TaskType.CLIENT_APP, "127.0.0.1:1", "secret", True, None, True, 5, False, 1
    )
    command = executor.command(spec)
    assert own_digest() in command
    assert "-P" in command
    assert "secret" not in command
    assert not [word for word in command if "dependency" in word]


def test_the_process_for_a_message_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It unpacks an allowed app to where its own name and hash say, whatever the server claims."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    run = replace(Run.create_empty(RUN), fab_id="a/b", fab_version="../../evil", fab_hash="0" * 64)
    context = Context(RUN, NODE, {}, RecordDict(), {})
    message = Server(b"").message

    def asked(content: bytes) -> clientapp.TaskInput:
        given = (message, context, run, Fab("0" * 64, content, {}))
        return clientapp.pulling(lambda client: given, OWN)(None)

    install = clientapp.installing(install_from_fab, OWN)
    other = build_fab_from_disk(changed_app(tmp_path / "app", COMMENT))
    *_, fab = asked(other)
    with pytest.raises(AppNotAllowed, match=f"^{REFUSAL}$"):
        install(fab.content, skip_prompt=True)
    assert not (tmp_path / "apps").exists()
    *_, true_run, fab = asked(own_app())
    assert (true_run.fab_id, true_run.fab_hash) == ("deal/federated-deal", own_digest())
    assert ".." not in true_run.fab_version
    assert fab.hash_str == own_digest()
    where = install(fab.content, skip_prompt=True)
    assert where.parent == tmp_path / "apps"
    assert (where / "deal_app.py").is_file()


def test_the_text_of_an_error_stays(tmp_path: Path) -> None:
    message = Server(b"").message
    sent: list[Message] = []
    push = clientapp.pushing(lambda client, message, context: sent.append(message))
    with assume_identity(RUN, NODE):
        quoting = Message(Error(2, "<class 'ValueError'>:<'Mrs X'>"), reply_to=message)
        push(None, quoting, Context(RUN, NODE, {}, RecordDict(), {}))
    assert (sent[0].error.code, sent[0].error.reason) == (2, "failed")
