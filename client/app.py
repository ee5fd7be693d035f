"""The Flower ClientApp: a message in, one call, a message out.

Flower's simulation engine sends the app itself along with every message, by value. So what must
outlive a message, the workbench, is kept by the process and not by the app.

Torch is imported with the first training or evaluation request, not before. An exception
stays here: the site's log has it, the server receives a code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.outgoing import check_reply
from client.site import site_folder, site_of
from client.state import FeedbackStore, forget
from deal_core.payload import PayloadError
from deal_core.run_config import from_run_config

if TYPE_CHECKING:
    from client.work import Desk
    from client.workbench import Workbench
    from deal_core.privacy.policy import Policy

log = logging.getLogger(__name__)
Handler = Callable[[Message, Context], Message]
NOT_FOR_CLIENTS = frozenset({"run.out", "run.resume", "run.engine"})
"""Keys of the run config on which nothing that a client computes depends."""


PolicyOf = Callable[[Context], "Policy | None"]
"""Finds a site's own policy; None where it has none."""
WorkbenchOf = Callable[[Context], "Workbench"]
"""Finds the workbench for a request."""


def make_app(
    policy_of: PolicyOf = lambda context: None, workbench_of: WorkbenchOf | None = None
) -> ClientApp:
    """Return a ClientApp; clients that share a process share one workbench.

    Args:
        policy_of: finds a site's own policy.
        workbench_of: finds the workbench; None: :func:`bench_of`, that of the run's experiment.
    """
    app = ClientApp()
    find_bench = workbench_of or bench_of

    def desk_of(context: Context) -> Desk:
        from client.work import Desk

        return Desk(
            client=client_of(context),
            store=FeedbackStore(site_folder(context)),
            site=site_of(context, policy_of(context)),
        )

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        site = ConfigRecord({"client": client_of(context)})
        return Message(RecordDict({"site": site}), reply_to=message)

    @app.train()
    @guarded
    def train(message: Message, context: Context) -> Message:
        from client import wire, work

        bench = find_bench(context)
        state, instruction = wire.read_request(message, bench)
        update = work.local_update(
            bench, desk_of(context), state, instruction, wire.request_name(message)
        )
        return wire.update_reply(message, update, instruction)

    @app.evaluate()
    @guarded
    def evaluate(message: Message, context: Context) -> Message:
        from client import wire, work

        bench = find_bench(context)
        state, instruction = wire.read_request(message, bench)
        if instruction.stage < 0:  # asked of every client, once, before a second stage
            forget(site_folder(context))
        counts = work.local_evaluation(
            bench, desk_of(context), state, instruction, wire.request_name(message)
        )
        return wire.evaluation_reply(message, counts)

    return app


def client_of(context: Context) -> int:
    """The client's stable number: which share of the data is its own."""
    return int(context.node_config["partition-id"])


def bench_of(context: Context) -> Workbench:
    """The workbench of the run's experiment, made with the first request that needs it."""
    settings = context.run_config.items()
    return _workbench(frozenset(item for item in settings if item[0] not in NOT_FOR_CLIENTS))


@lru_cache(maxsize=1)
def _workbench(settings: frozenset[tuple[str, bool | int | float | str]]) -> Workbench:
    """One per process: a base model takes a second to load, and most of the memory."""
    from client.workbench import Workbench

    return Workbench(from_run_config(dict(settings)))


def guarded(handler: Handler) -> Handler:
    """Answer a fault with a code: an exception's text may hold private data."""

    def answer(message: Message, context: Context) -> Message:
        from client import wire
        from deal_core.privacy.interface import Refusal

        try:
            return check_reply(handler(message, context))
        except Refusal as refusal:
            log.warning("takes no part: %s", refusal)
            return wire.status_reply(message, refusal.code)
        except PayloadError as error:
            log.error("request refused: %s", error)
            return wire.status_reply(message, "refused")
        except Exception:
            log.exception("request failed")
            return wire.status_reply(message, "failed")

    return answer


app = make_app()
