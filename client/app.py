"""The Flower ClientApp: a message in, one call, a message out.

Flower's simulation engine sends the app itself along with every message, by value. So what must
outlive a message, the workbench, is kept by the process and not by the app.

Torch is imported with the first training or evaluation request, not before. An exception
stays here: the site's log has it, the server receives a code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import resident_worker as worker
from client.context import RequestContext, choose_device, file_of, here, log_of
from client.distilled_store import DistilledMissing, DistilledStore
from client.egress import check_reply
from client.reply_cache import UpdateStore
from client.site import site_of
from client.site_file import NODE_KEY
from client.site_log import SiteLog
from client.state import FeedbackStore, folder_of, forget
from client.status_reply import STATUS, fault_reply, secure_reply, status_reply
from deal_core.imports import without_collection
from deal_core.lora.payload import LORA, SUMS, PayloadError
from deal_core.privacy.policy import OutsidePolicy, Refusal, counts_in_sum
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.wire.secure_record import LEGS

if TYPE_CHECKING:
    from client.client_context import ClientContext
    from client.resources import Workbench
    from deal_core.privacy.interface import Counts, LocalUpdate, Site

log = logging.getLogger(__name__)
Handler = Callable[[Message, Context], Message]
NOT_FOR_CLIENTS = frozenset({"run.out", "run.resume", "run.engine", "run.track"})
"""Keys of the run config on which nothing that a client computes depends."""
TOLD = ("task", "stage", "phase", "server_round")
"""Of an instruction, what the site's log repeats."""
FAULTS = frozenset({"failed", "refused"})
"""Codes of what went wrong; the others are a client's own refusals."""
OWN_RULES = (Refusal, OutsidePolicy, DistilledMissing)
"""By which a site declines a request, or asks for it once more: nothing went wrong."""

SiteOf = Callable[[RequestContext], "Site"]
"""What a privacy mechanism must know of a client."""
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

    def client_context_of(place: RequestContext, run: str) -> ClientContext:
        from client.client_context import ClientContext

        site = find_site(place)
        known = site if place.site is None else replace(site, run=run)
        return ClientContext(place.client, FeedbackStore(folder_of(place.folder, known.run)), known)

    @app.query("hello")
    @guarded
    def hello(message: Message, context: Context) -> Message:
        site = ConfigRecord({"client": here(context).client})
        status = ConfigRecord({"code": "ok"})
        return Message(RecordDict({STATUS: status, "site": site}), reply_to=message)

    @app.query("adapter")
    @guarded
    def adapter(message: Message, context: Context) -> Message:
        from client.adapter_store import store_adapter

        store_adapter(here(context), message)
        return status_reply(message, "ok")

    @app.query("announce")
    @guarded
    def announce(message: Message, context: Context) -> Message:
        from client.secure_legs import announcement

        return secure_reply(message, announcement(here(context), message))

    for leg in LEGS:
        app.query(leg)(guarded(partial(secure_leg, leg)))

    @app.train()
    @kept_warm
    @guarded
    def train(message: Message, context: Context) -> Message:
        place = here(context)
        bench = bench_for(context, place)
        from client import wire
        from client.local_evaluation import local_evaluation
        from client.local_update import as_allowed, local_update, require_allowed
        from client.secure_update import maskable_update, summed_arrays

        state, instruction = wire.read_request(message, bench, DistilledStore(place.folder))
        run = place.run_name(dict(context.run_config))
        client_context = client_context_of(place, run)
        name = wire.request_name(message, instruction, run)
        today = place.as_of_today(name)

        def count() -> Counts:
            asked = instruction.evaluation()
            evaluation = wire.request_name(message, asked, run)
            return local_evaluation(bench, client_context, state, asked, evaluation)

        def learn() -> LocalUpdate:
            return local_update(bench, client_context, state, instruction, name)

        record = SUMS if bench.phase(instruction.phase).statistics is not None else LORA
        require_allowed(bench, client_context, instruction)
        secure = bench.experiment.aggregation.secure
        if secure:  # before anything is counted, trained or charged
            maskable = maskable_update(place, bench, message, state, instruction, today)
            maskable.require()
        counts = (
            counts_or_error(message, context, count) if instruction.piggybacked_evaluation else None
        )
        if place.site is None:
            update = learn()
        else:
            kept = UpdateStore(place.folder).once(today, instruction, learn)
            update = as_allowed(kept, client_context.site.policy, secure)
        if secure:
            layout, simulated = maskable.layout, place.site is None
            arrays = summed_arrays(bench, state, instruction, update, layout, simulated)
            masked = maskable.masked(arrays, bench.experiment.run.seed)
            return wire.secure_update_reply(message, update.figures, instruction, counts, masked)
        return wire.update_reply(message, update, instruction, counts, record)

    @app.evaluate()
    @kept_warm
    @guarded
    def evaluate(message: Message, context: Context) -> Message:
        place = here(context)
        bench = bench_for(context, place)
        from client import wire
        from client.local_evaluation import local_evaluation
        from client.secure_counts import as_arrays, maskable_counts

        state, instruction = wire.read_request(message, bench, DistilledStore(place.folder))
        if instruction.task:
            raise PayloadError("instruction: an evaluation is of no one task")
        # Asked of every client, once, before a second stage. A site has a folder for each run.
        if instruction.stage < 0 and place.site is None:
            forget(folder_of(place.folder, ""))
        run = place.run_name(dict(context.run_config))
        name = wire.request_name(message, instruction, run)
        if not counts_in_sum(bench.experiment):
            counts = local_evaluation(
                bench, client_context_of(place, run), state, instruction, name
            )
            return wire.evaluation_reply(message, counts)
        today = place.as_of_today(name)
        maskable = maskable_counts(place, bench, message, state, instruction, today)
        maskable.require()
        counts = local_evaluation(
            bench, client_context_of(place, run), state, instruction, name, masked=True
        )
        return secure_reply(message, maskable.masked(as_arrays(counts), bench.experiment.run.seed))

    return app


def secure_leg(leg: str, message: Message, context: Context) -> Message:
    """Answer a leg of a secure sum; no model is loaded."""
    from client.secure_legs import leg_reply

    place = here(context)
    experiment = place.experiment(dict(context.run_config))
    return secure_reply(message, leg_reply(place, experiment, message, leg))


def bench_of(context: Context, place: RequestContext) -> Workbench:
    """The workbench of the run's experiment, made with the first request that needs it."""
    settings = context.run_config.items()
    asked = frozenset(item for item in settings if item[0] not in NOT_FOR_CLIENTS)
    decided = place.site.model_dump_json() if place.site is not None else ""
    return _workbench(asked, decided)


@lru_cache(maxsize=1)
def _workbench(settings: frozenset[tuple[str, bool | int | float | str]], site: str) -> Workbench:
    """One per process: a base model takes a second to load, and most of the memory."""
    from client.site_file import SiteFile

    decided = SiteFile.model_validate_json(site) if site else None
    if decided is not None:
        choose_device(decided)
    with without_collection():
        from client.resources import Workbench

    experiment = RequestContext(0, Path(), decided).experiment(dict(settings))
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


def counts_or_error(
    message: Message, context: Context, count: Callable[[], Counts]
) -> tuple[str, Counts]:
    """Return a code, and the counts that a training request asks for as well (none after a fault):
    whatever becomes of them, the client trains."""
    try:
        return "ok", count()
    except Exception as error:
        return log_fault(message, context, error), {}


def log_fault(message: Message, context: Context, error: Exception) -> str:
    """The code of a fault, or of a refusal, which is all that leaves; the log here has the rest."""
    code, own = code_of(error), log_of(context)
    if own is not None:
        note = own.refusal if isinstance(error, OWN_RULES) else own.fault
        note(f"request_{code}", error, **log_fields(message))
    elif code in FAULTS:
        log.error("request answered with '%s'", code, exc_info=error)
    else:  # by the client's own rules: nothing went wrong, and the run's own output says so
        log.info("client %s takes no part (%s): %s", here(context).client, code, error)
    return code


def code_of(error: Exception) -> str:
    """The fixed word for a fault, or for a site's own refusal (a policy, a budget, no data)."""
    if isinstance(error, PayloadError):
        return "refused"
    if isinstance(error, DistilledMissing):
        return "resend"
    if isinstance(error, OutsidePolicy):
        return "policy"
    return error.code if isinstance(error, (Refusal, ProtocolError)) else "failed"


def log_fields(message: Message) -> dict[str, Any]:
    """What a request is about, for the site's log."""
    records = message.content.config_records if message.has_content() else {}
    instruction: Mapping[str, Any] = records.get("instruction", {})
    about = {key: str(instruction[key])[:100] for key in TOLD if key in instruction}
    return {"asked": message.metadata.message_type, **about}


app = make_app()
