"""Other users of a site's machine can take no message from Flower's local interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from simulations.deployment.site.supernode import new_secret
from tests.simulations.deployment.loopback import free_port


@pytest.fixture
def interface(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Its address, and the secret, while a message waits."""
    secret = new_secret(tmp_path)
    states = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    states.state().create_task(task_type=TaskType.CLIENT_APP, run_id=7, fab_hash="f")
    port = free_port()
    app = create_app(states, secret.read_bytes())
    plain = {"log_level": "error", "ws": "none", "http": "h11", "loop": "asyncio"}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **plain))
    thread = threading.Thread(target=server.run)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.05)
    yield f"127.0.0.1:{port}", secret
    server.should_exit = True
    thread.join()


def take(address: str, secret: bytes | None) -> AcquireTaskResponse:
    protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    signing = (
        [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)]
        if secret
        else []
    )
    client = RuntimeHttpClient.from_server_address(address, True, None, interceptors=signing)
    try:
        kinds = [TaskType.CLIENT_APP]
        return client.AcquireTask(AcquireTaskRequest(supported_task_types=kinds))
    finally:
        client.close()


def test_only_who_can_read_the_secret_takes_a_message(interface: tuple[str, Path]) -> None:
    address, secret = interface
    assert secret.stat().st_mode & 0o777 == 0o600
    for guess in (None, b"0" * 64):
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            take(address, guess)
    assert take(address, secret.read_bytes()).token


def test_every_start_has_a_secret_of_its_own(tmp_path: Path) -> None:
    assert new_secret(tmp_path).read_bytes() != new_secret(tmp_path).read_bytes()
