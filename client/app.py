"""The Flower ClientApp: a message in, one call, a message out.

Flower's simulation engine sends the app itself along with every message, by value. So what must
outlive a message, the workbench, is kept by the process and not by the app.

Torch is imported with the first training or evaluation request, not before. An exception
stays here: the site's log has it, the server receives a code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import resident_worker as worker
from client.context import RequestContext, choose_device, file_of, here, log_of
from client.egress import check_reply
from client.faults import log_fault, log_fields
from client.received import Received, SiteOf
from client.site import site_of
from client.site_file import NODE_KEY
from client.site_log import SiteLog
from client.status_reply import STATUS, fault_reply, secure_reply, status_reply
from deal_core.config.experiment import RunConfig
from deal_core.config.run_config import EXPERIMENT, as_text, from_run_config
from deal_core.installed import without_collection
from deal_core.wire.records import LEGS

if TYPE_CHECKING:
    from client.resources import Workbench

Handler = Callable[[Message, Context], Message]
NOT_FOR_CLIENTS = ("out", "resume", "engine", "track")
"""Keys of ``[run]`` on which nothing that a client computes depends."""

WorkbenchOf = Callable[[Context, RequestContext], "Workbench"]
"""Finds the workbench for a request."""


def make_app(find_site: SiteOf = site_of, find_bench: WorkbenchOf | None = None) -> ClientApp:
    """Return a ClientApp; clients that share a process share one workbench.

    Args:
        find_site: for tests of policies, and audits.
        find_bench: None: :func:`bench_of`, that of the run's experiment.
    """
    app = ClientApp()
    bench_for = find_bench or bench_of

    def received(message: Message, context: Context) -> Received:
        client = here(context)
        return Received(message, context, client, bench_for(context, client), find_site)

    @app.train()
    @kept_warm
    @guarded
    def train(message: Message, context: Context) -> Message:
        request = received(message, context)
        from client.replies import training_reply

        return training_reply(request)

    @app.evaluate()
    @kept_warm
    @guarded
    def evaluate(message: Message, context: Context) -> Message:
        request = received(message, context)
        from client.replies import evaluation_reply

        return evaluation_reply(request)

    app.query("hello")(guarded(hello))
    app.query("adapter")(guarded(adapter))
    app.query("announce")(guarded(announce))
    for leg in LEGS:
        app.query(leg)(guarded(partial(secure_leg, leg)))
    return app


def hello(message: Message, context: Context) -> Message:
    """Tell the client's number."""
    site = ConfigRecord({"client": here(context).client})
    status = ConfigRecord({"code": "ok"})
    return Message(RecordDict({STATUS: status, "site": site}), reply_to=message)


def adapter(message: Message, context: Context) -> Message:
    """Keep the adapter that the server hands out."""
    from client.adapter_store import store_adapter

    store_adapter(here(context), message)
    return status_reply(message, "ok")


def announce(message: Message, context: Context) -> Message:
    """Tell the keys with which the client takes part in secure sums."""
    from client.secure.protocol import announcement

    return secure_reply(message, announcement(here(context), message))


def secure_leg(leg: str, message: Message, context: Context) -> Message:
    """Answer a leg of a secure sum; no model is loaded."""
    from client.secure.protocol import leg_reply

    place = here(context)
    experiment = place.experiment(dict(context.run_config))
    return secure_reply(message, leg_reply(place, experiment, message, leg))


def bench_of(context: Context, place: RequestContext) -> Workbench:
    """The workbench of the run's experiment, made with the first request that needs it."""
    asked, plain = from_run_config(context.run_config), RunConfig()
    run = asked.run.model_copy(update={name: getattr(plain, name) for name in NOT_FOR_CLIENTS})
    text = as_text(asked.model_copy(update={"run": run}))
    decided = place.site.model_dump_json() if place.site is not None else ""
    return _workbench(text, decided)


@lru_cache(maxsize=1)
def _workbench(asked: str, site: str) -> Workbench:
    """One per process: a base model takes a second to load, and most of the memory."""
    from client.site_file import SiteFile

    decided = SiteFile.model_validate_json(site) if site else None
    if decided is not None:
        choose_device(decided)
    with without_collection():
        from client.resources import Workbench

    experiment = RequestContext(0, Path(), decided).experiment({EXPERIMENT: asked})
    if decided is None:
        return Workbench(experiment)
    book = SiteLog(Path(decided.site.state))
    return Workbench(
        experiment,
        whole=True,
        on_left_out=lambda task, rows: book.write("rows_left_out", task=task, rows=rows),
    )


def kept_warm(handler: Handler) -> Handler:
    """At a site, let the process do the work that has the model already."""

    def answer(message: Message, context: Context) -> Message:
        site = file_of(context)
        if site is None or worker.INSIDE in context.node_config:
            return handler(message, context)
        try:
            reply = worker.ask(site, message, context)
        except Exception as error:  # outside the handler's own guard: it must not get to Flower
            log_fault(message, context, error)
            reply = None
        return handler(message, context) if reply is None else reply

    return answer


def guarded(handler: Handler) -> Handler:
    """Answer a fault with a code: an exception's text may hold private data."""

    def answer(message: Message, context: Context) -> Message:
        started = time.monotonic()
        own = log_of(context)
        asked = log_fields(message)
        if own is not None:
            own.write("arrived", **asked)
        try:
            reply = check_reply(handler(message, context), message, masked_only(context))
        except Exception as error:
            return fault_reply(message, log_fault(message, context, error), error)
        if own is not None:
            code = str(reply.content.config_records[STATUS]["code"])
            own.write("answered", code=code, seconds=time.monotonic() - started, **asked)
        return reply

    return answer


def masked_only(context: Context) -> bool:
    """Return whether the site's policy lets nothing that is learnt leave but in a secure sum; True
    too where a site's file cannot be read."""
    site = file_of(context)
    if site is None:
        return NODE_KEY in context.node_config
    return site.policy is not None and site.policy.secure_aggregation == "required"


app = make_app()
