"""Engine ``inprocess``: the same apps as everywhere, in one process, deterministic.

All simulated clients share one frozen base model. Every message is rebuilt on its way, so no
client can see or change what another one holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from uuid import uuid4

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from deal_core.config import Experiment, flatten
from server.events import Listener
from simulations.faults import spoiler
from simulations.identity import assume_identity

RUN_ID = 1
SERVER_NODE = 1
FIRST_CLIENT_NODE = 100
CLIENT_FAILED = 2
"""Flower's error code for a ClientApp that raised."""

Interceptor = Callable[[Message], Message | None]
"""Sees each reply on its way back and may change or lose it: fault injection for tests."""


class InProcessGrid(Grid):
    """Flower's Grid over ClientApps in this process; a request runs when it is pulled."""

    def __init__(
        self, app: ClientApp, run_config: dict[str, bool | int | float | str], clients: int
    ) -> None:
        self._app = app
        self._contexts = {
            FIRST_CLIENT_NODE + number: Context(
                run_id=RUN_ID,
                node_id=FIRST_CLIENT_NODE + number,
                node_config={"partition-id": number, "num-partitions": clients},
                state=RecordDict(),
                run_config=run_config,
            )
            for number in range(clients)
        }
        self._pending: deque[Message] = deque()
        self._replies: dict[str, Message] = {}
        self.interceptor: Interceptor | None = None
        self._run = Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message from the server."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """All simulated clients are always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue requests."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            self._pending.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the next queued request and return its reply if it is asked for."""
        wanted = set(message_ids)
        if self._pending:
            request = self._pending.popleft()
            reply = self._execute(request)
            if self.interceptor is not None:
                reply = self.interceptor(reply)  # type: ignore[assignment]
            if reply is not None:
                self._replies[request.metadata.message_id] = reply
        return [self._replies.pop(key) for key in list(self._replies) if key in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all requests at once; there is nothing to wait for."""
        ids = list(self.push_messages(messages))
        return [reply for _ in ids for reply in self.pull_messages(ids)]

    def _execute(self, request: Message) -> Message:
        context = self._contexts[request.metadata.dst_node_id]
        sent, request.content = request.content, copy(request.content)
        try:
            reply = self._app(request, context)
        except Exception:
            return Message(Error(CLIENT_FAILED, "ClientApp raised"), reply_to=request)
        finally:
            request.content = sent
        return Message(copy(reply.content), reply_to=request)


def copy(content: RecordDict) -> RecordDict:
    """Rebuild every record: what arrives shares nothing that can be changed with what was sent
    (the bytes of an array are immutable, so they are not copied)."""
    rebuilt = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            rebuilt[name] = ArrayRecord(
                {key: Array(a.dtype, a.shape, a.stype, a.data) for key, a in record.items()}
            )
        elif isinstance(record, MetricRecord):
            rebuilt[name] = MetricRecord(dict(record))
        else:
            rebuilt[name] = ConfigRecord(dict(record))
    return rebuilt


def run_inprocess(experiment: Experiment, listener: Listener) -> None:
    """Run the experiment to its end; the server's errors pass through."""
    from client.app import make_app as make_client_app
    from server.app import make_app as make_server_app

    run_config = flatten(experiment)
    clients = experiment.federation.clients
    grid = InProcessGrid(make_client_app(), run_config, clients)
    if experiment.faults.clients:
        grid.interceptor = spoiler(experiment.faults, FIRST_CLIENT_NODE)
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config)
    with assume_identity(RUN_ID, SERVER_NODE):
        make_server_app(listener)(grid, context)
