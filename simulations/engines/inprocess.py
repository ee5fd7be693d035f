"""Engine ``inprocess``: the same apps as everywhere, without a network, deterministic.

All simulated clients of a process share one frozen base model. Every message is rebuilt on its
way, so no client can see or change what another one holds.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import BrokenExecutor, Future
from copy import copy as shallow
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.errors import UserError
from server.folder import Listener
from simulations.engines.worker_pool import (
    WorkerPool,
    as_run_by,
    assume_identity,
    this_machine,
    worker_pool,
)

RUN_ID = 1
SERVER_NODE = 1
FIRST_CLIENT_NODE = 100
CLIENT_FAILED = 2
"""Flower's error code for a ClientApp that raised."""

Interceptor = Callable[[Message], Message | None]
"""Sees each reply on its way back, and may change or lose it."""


class InProcessGrid(Grid):
    """Flower's Grid over ClientApps in this process; a request runs when it is pulled. With a
    pool of workers requests run there as soon as they are pushed; replies keep their order."""

    def __init__(
        self,
        app: ClientApp,
        run_config: dict[str, bool | int | float | str],
        clients: int,
        pool: WorkerPool | None = None,
    ) -> None:
        self._app = app
        self._pool = pool
        self._run_config = run_config
        self._nodes = range(FIRST_CLIENT_NODE, FIRST_CLIENT_NODE + clients)
        self._contexts: dict[int, Context] = {}
        self._pending: deque[tuple[Message, Future[Message] | None]] = deque()
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
        """Return the ids of all simulated clients: they are always connected."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue requests."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            running, node = None, message.metadata.dst_node_id
            if self._pool is not None:
                context = self._context(node)
                running = self._pool.submit(node - FIRST_CLIENT_NODE, message, context)
            self._pending.append((message, running))
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run queued requests until one is answered: a lost reply delays no other.

        Returns:
            The replies that are there, of those that are asked for; none is given twice.
        """
        # No set of all is made for every reply: ten thousand clients may be waited for.
        wanted = message_ids if isinstance(message_ids, Collection) else list(message_ids)
        answered = False
        while self._pending and not answered:
            request, running = self._pending.popleft()
            reply = self._execute(request) if running is None else arrived(request, running)
            if self.interceptor is not None:
                reply = self.interceptor(reply)  # type: ignore[assignment]
            answered = reply is not None
            if reply is not None:
                self._replies[request.metadata.message_id] = reply
        return [self._replies.pop(key) for key in list(self._replies) if key in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run all requests at once; there is nothing to wait for."""
        ids = set(self.push_messages(messages))
        return [reply for _ in range(len(ids)) for reply in self.pull_messages(ids)]

    def _execute(self, request: Message) -> Message:
        context = self._context(request.metadata.dst_node_id)
        sent, request.content = request.content, rebuild(request.content)
        try:
            reply = self._app(request, context)
        except Exception:
            return Message(Error(CLIENT_FAILED, "ClientApp raised"), reply_to=request)
        finally:
            request.content = sent
        return Message(rebuild(reply.content), reply_to=request)

    def _context(self, node: int) -> Context:
        """Return a client's own context, made with its first request: the others cost nothing."""
        if node not in self._contexts:
            if node not in self._nodes:
                raise KeyError(node)
            self._contexts[node] = Context(
                run_id=RUN_ID,
                node_id=node,
                node_config={
                    "partition-id": node - FIRST_CLIENT_NODE,
                    "num-partitions": len(self._nodes),
                },
                state=RecordDict(),
                run_config=self._run_config,
            )
        return self._contexts[node]


def arrived(request: Message, running: Future[Message]) -> Message:
    """Return a worker's reply, once it is there; an error in its place where its app raised one.

    Raises:
        UserError: the worker process is gone.
    """
    try:
        return running.result()
    except BrokenExecutor:
        raise UserError(
            "a worker process ended before its time (out of memory?); continue with --resume, "
            "perhaps with a smaller run.workers"
        ) from None
    except Exception:
        return Message(Error(CLIENT_FAILED, "ClientApp raised"), reply_to=request)


def rebuild(content: RecordDict) -> RecordDict:
    """Return the content with every record rebuilt: sender and receiver share nothing mutable (the
    bytes and the shape of an array are immutable, so they are not copied)."""
    rebuilt = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            rebuilt[name] = ArrayRecord({key: shallow(array) for key, array in record.items()})
        elif isinstance(record, MetricRecord):
            rebuilt[name] = MetricRecord(dict(record))
        else:
            rebuilt[name] = ConfigRecord(dict(record))
    return rebuilt


def run_inprocess(experiment: Experiment, listener: Listener) -> None:
    """Run the experiment to its end; the server's errors pass through."""
    from client.app import make_app as make_client_app
    from server.app import make_app as make_server_app

    workers = this_machine(experiment)
    run_config = to_run_config(as_run_by(workers, experiment))
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config)
    with assume_identity(RUN_ID, SERVER_NODE), worker_pool(workers, RUN_ID, SERVER_NODE) as pool:
        grid = InProcessGrid(make_client_app(), run_config, experiment.federation.clients, pool)
        make_server_app(listener)(grid, context)
