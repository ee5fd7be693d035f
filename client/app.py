"""The Flower ClientApp: a message in, one call, a message out.

Flower's simulation engine sends the app itself along with every message, by value. So what must
outlive a message, the model and the tokenised data, is kept by the process and not by the app.

Torch is imported with the first training or evaluation request, not before. An exception
stays here: the site's log has it, the server receives a code.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp

from client import resident_worker as worker
from client.egress import check_reply
from client.identity import (
    STATUS,
    Client,
    as_the_site_decides,
    client_of,
    file_of,
    log_fault,
    status_reply,
    write_log,
)
from client.site_file import SiteFile
from client.state import store_adapter
from deal_core.config.experiment import show_device
from deal_core.config.file import EXPERIMENT, from_run_config
from deal_core.installed import without_collection
from deal_core.lora.payload import PayloadError
from deal_core.secure_sum.messages import ProtocolError
from deal_core.wire.records import QUERIES

if TYPE_CHECKING:
    from client.runtime import ClientRuntime

Answer = Callable[[Message, Client], Message]
TOOK: dict[str, float] = {}
"""Kind of a request to the seconds that the last one took in this process."""


def make_app(
    find_runtime: Callable[[Client], ClientRuntime] | None = None,
    find_file: Callable[[Context], SiteFile | None] = file_of,
    app: ClientApp | None = None,
) -> ClientApp:
    """Return a ClientApp; clients that share a process share one runtime.

    Args:
        find_runtime: None: :func:`runtime_of`, that of the run's experiment.
        find_file: what the site has decided; None: a simulated client.
        app: to which the answers are added; None: a new one.
    """
    app, find = app or ClientApp(), find_runtime or runtime_of

    def with_model(message: Message, client: Client) -> Message:
        runtime = find(client)
        from client import requests

        trains = message.metadata.message_type == MessageType.TRAIN
        reply = requests.training_reply if trains else requests.evaluation_reply
        return reply(message, client, runtime)

    app.train()(guarded(with_model, needs_model=True, find_file=find_file))
    app.evaluate()(guarded(with_model, needs_model=True, find_file=find_file))
    queries: dict[str, Answer] = {"hello": hello, "adapter": adapter}
    queries |= {exchange: partial(secure_exchange, exchange) for exchange in ("announce", *QUERIES)}
    for name, answer in queries.items():
        app.query(name)(guarded(answer, find_file=find_file))
    return app


def hello(message: Message, client: Client) -> Message:
    """Tell the client's number."""
    reply = status_reply(message, "ok")
    reply.content["site"] = ConfigRecord({"client": client.number})
    return reply


def adapter(message: Message, client: Client) -> Message:
    """Keep the adapter that the server hands out, or raise a PayloadError."""
    if client.file is None:
        raise PayloadError("only a site keeps an adapter")
    store_adapter(client.folder, message)
    return status_reply(message, "ok")


def secure_exchange(exchange: str, message: Message, client: Client) -> Message:
    """Answer an exchange of a secure sum; no model is loaded."""
    from client.secure_exchanges import announcement, exchange_reply, secure_reply

    announces = exchange == "announce"
    made = announcement(client, message) if announces else exchange_reply(client, message, exchange)
    return secure_reply(message, made)


def runtime_of(client: Client) -> ClientRuntime:
    """Return the runtime of the run's experiment, made with the first request that needs it."""
    return _runtime(
        client.settings, client.file.model_dump_json() if client.file is not None else ""
    )


@lru_cache(maxsize=1)
def _runtime(asked: str, site: str) -> ClientRuntime:
    """One per process: a base model takes a second to load, and most of the memory."""
    file = SiteFile.model_validate_json(site) if site else None
    if file is not None:
        show_device(file.compute.device)
    with without_collection():
        from client.runtime import ClientRuntime

    experiment = from_run_config({EXPERIMENT: asked})
    if file is None:
        return ClientRuntime(experiment)
    return ClientRuntime(
        as_the_site_decides(experiment, file),
        whole=True,
        on_left_out=lambda task, rows: write_log(file, "rows_left_out", task=task, rows=rows),
    )


def in_time(file: SiteFile, message: Message) -> bool:
    """Return whether work on a request may begin: before its deadline, since nobody takes what was
    charged later. One that is too late is in the log, and where the last one took longer than there
    is time for this one, a warning."""
    left, took = worker.time_left(message), TOOK.get(message.metadata.message_type, 0.0)
    if left <= 0:
        write_log(file, "too_late", message, seconds_after_deadline=-left)
    elif took > left:
        write_log(file, "may_be_late", message, seconds_left=left, seconds_last_time=took)
    return left > 0


def guarded(
    answer: Answer,
    needs_model: bool = False,
    find_file: Callable[[Context], SiteFile | None] = file_of,
) -> Callable[[Message, Context], Message]:
    """Answer a fault with a code; what ``needs_model`` is done where a site keeps one."""

    def handler(message: Message, context: Context) -> Message:
        started, file = time.monotonic(), None
        try:
            file = find_file(context)
            if file is not None:
                with suppress(OSError):  # who writes there says what is wrong
                    Path(file.site.state).mkdir(mode=0o700, parents=True, exist_ok=True)
                if needs_model and not in_time(file, message):
                    return status_reply(message, "failed")
                if needs_model and worker.INSIDE not in context.node_config:
                    try:
                        reply = worker.ask(file, message, context)
                    except Exception as error:  # this process does the work
                        log_fault(message, error, file, file.site.name)
                        reply = None
                    if reply is not None:
                        return reply
                write_log(file, "arrived", message)
            client = client_of(context, file)
            reply = check_reply(answer(message, client), message, client.masked_only)
        except Exception as error:
            code = log_fault(message, error, file, context.node_config.get("partition-id"))
            if isinstance(error, ProtocolError) and code == ProtocolError.code:
                return status_reply(message, code, error.site.hex())
            return status_reply(message, code)
        if file is not None:
            ended, taken = reply.content.config_records[STATUS]["code"], time.monotonic() - started
            late = -worker.time_left(message) if needs_model else 0.0
            after = {"seconds_after_deadline": late} if late > 0 else {}
            write_log(file, "answered", message, code=ended, seconds=taken, **after)
            TOOK[message.metadata.message_type] = taken
        return reply

    return handler


app = make_app()

if __name__ == "__main__":  # the process that stays: see client.resident_worker
    worker.serve(app, Path(sys.argv[1]), float(sys.argv[2]))
