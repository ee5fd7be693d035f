"""The Flower ClientApp: a message in, one call, a message out.

Flower's simulation engine sends the app itself along with every message, by value. So what must
outlive a message, the model and the tokenised data, is kept by the process and not by the app.

Torch is imported with the first training or evaluation request, not before. An exception
stays here: the site's log has it, the server receives a code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import resident_worker as worker
from client.egress import check_reply
from client.faults import STATUS, fault_reply, log_fault, log_fields, status_reply
from client.gate import as_the_site_decides
from client.identity import Client, SiteOf, client_of, file_of, log_of, site_of
from client.site_file import NODE_KEY, SiteFile, SiteLog
from client.state import store_adapter
from deal_core.config.experiment import RunConfig
from deal_core.config.run_config import EXPERIMENT, as_text, from_run_config
from deal_core.installed import without_collection
from deal_core.lora.payload import PayloadError
from deal_core.wire.records import LEGS

if TYPE_CHECKING:
    from client.runtime import ClientRuntime

Handler = Callable[[Message, Context], Message]
Answer = Callable[[Message, Client], Message]
RuntimeOf = Callable[[Client], "ClientRuntime"]
"""Finds the runtime for a request."""
NOT_FOR_CLIENTS = ("out", "resume", "engine", "track")
"""Keys of ``[run]`` on which nothing that a client computes depends."""


def make_app(find_site: SiteOf = site_of, find_runtime: RuntimeOf | None = None) -> ClientApp:
    """Return a ClientApp; clients that share a process share one runtime.

    Args:
        find_site: for tests of policies.
        find_runtime: for audits; None: :func:`runtime_of`, that of the run's experiment.
    """
    app, find = ClientApp(), find_runtime or runtime_of

    def train(message: Message, client: Client) -> Message:
        runtime = find(client)
        from client.requests import training_reply

        return training_reply(message, client, runtime)

    def evaluate(message: Message, client: Client) -> Message:
        runtime = find(client)
        from client.requests import evaluation_reply

        return evaluation_reply(message, client, runtime)

    app.train()(kept_warm(guarded(train, find_site)))
    app.evaluate()(kept_warm(guarded(evaluate, find_site)))
    queries: dict[str, Answer] = {"hello": hello, "adapter": adapter, "announce": announce}
    queries |= {leg: partial(secure_leg, leg) for leg in LEGS}
    for name, answer in queries.items():
        app.query(name)(guarded(answer, find_site))
    return app


def hello(message: Message, client: Client) -> Message:
    """Tell the client's number."""
    site = ConfigRecord({"client": client.number})
    status = ConfigRecord({"code": "ok"})
    return Message(RecordDict({STATUS: status, "site": site}), reply_to=message)


def adapter(message: Message, client: Client) -> Message:
    """Return a code, once the adapter that the server hands out is kept.

    Raises:
        PayloadError: see :func:`~client.state.store_adapter`; or the client is no site.
    """
    if client.file is None:
        raise PayloadError("only a site keeps an adapter")
    store_adapter(client.folder, message)
    return status_reply(message, "ok")


def announce(message: Message, client: Client) -> Message:
    """Tell the keys with which the client takes part in secure sums."""
    from client.secure_legs import announcement, secure_reply

    return secure_reply(message, announcement(client, message))


def secure_leg(leg: str, message: Message, client: Client) -> Message:
    """Answer a leg of a secure sum; no model is loaded."""
    from client.secure_legs import leg_reply, secure_reply

    return secure_reply(message, leg_reply(client, message, leg))


def runtime_of(client: Client) -> ClientRuntime:
    """The runtime of the run's experiment, made with the first request that needs it."""
    asked, plain = client.asked, RunConfig()
    run = asked.run.model_copy(update={name: getattr(plain, name) for name in NOT_FOR_CLIENTS})
    text = as_text(asked.model_copy(update={"run": run}))
    return _runtime(text, client.file.model_dump_json() if client.file is not None else "")


@lru_cache(maxsize=1)
def _runtime(asked: str, site: str) -> ClientRuntime:
    """One per process: a base model takes a second to load, and most of the memory."""
    file = SiteFile.model_validate_json(site) if site else None
    if file is not None:
        choose_device(file)
    with without_collection():
        from client.runtime import ClientRuntime

    experiment = from_run_config({EXPERIMENT: asked})
    if file is None:
        return ClientRuntime(experiment)
    book = SiteLog(Path(file.site.state))
    return ClientRuntime(
        as_the_site_decides(experiment, file),
        whole=True,
        on_left_out=lambda task, rows: book.write("rows_left_out", task=task, rows=rows),
    )


def choose_device(site: SiteFile) -> None:
    """Show torch only the device that the site lends; before torch is imported."""
    kind, _, number = site.compute.device.partition(":")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number


def kept_warm(handler: Handler) -> Handler:
    """At a site, let the process do the work that has the model already."""

    def answer(message: Message, context: Context) -> Message:
        site = file_of(context)
        if site is None or worker.INSIDE in context.node_config:
            return handler(message, context)
        try:
            reply = worker.ask(site, message, context)
        except Exception as error:  # outside the handler's own guard: it must not get to Flower
            log_fault(message, error, log_of(site), site.site.name)
            reply = None
        return handler(message, context) if reply is None else reply

    return answer


def guarded(answer: Answer, find_site: SiteOf = site_of) -> Handler:
    """Answer a fault with a code: an exception's text may hold private data."""

    def handler(message: Message, context: Context) -> Message:
        started, file, asked = time.monotonic(), file_of(context), log_fields(message)
        own = log_of(file)
        if own is not None:
            own.write("arrived", **asked)
        try:
            client = client_of(context, file, find_site)
            reply = check_reply(answer(message, client), message, masked_only(context, file))
        except Exception as error:
            number = context.node_config.get("partition-id")
            return fault_reply(message, log_fault(message, error, own, number), error)
        if own is not None:
            code = str(reply.content.config_records[STATUS]["code"])
            own.write("answered", code=code, seconds=time.monotonic() - started, **asked)
        return reply

    return handler


def masked_only(context: Context, file: SiteFile | None) -> bool:
    """Return whether the site's policy lets nothing that is learnt leave but in a secure sum; True
    too where a site's file cannot be read."""
    if file is None:
        return NODE_KEY in context.node_config
    return file.policy is not None and file.policy.secure_aggregation == "required"


app = make_app()

if __name__ == "__main__":  # the process that stays: see client.resident_worker
    worker.serve(app, Path(sys.argv[1]), float(sys.argv[2]))
