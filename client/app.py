"""The Flower ClientApp: a message in, one call, a message out.

Torch is imported with the first training or evaluation request, not before. An exception
stays here: the site's log has it, the server receives a code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.outgoing import check_reply
from client.state import FeedbackStore, TaskStore
from deal_core.config import Experiment, from_run_config
from deal_core.payload import PayloadError

if TYPE_CHECKING:
    from client.workbench import Workbench

log = logging.getLogger(__name__)
Handler = Callable[[Message, Context], Message]
UserConfig = dict[str, bool | int | float | str]


def make_app() -> ClientApp:
    """Return a ClientApp whose clients, where they share a process, share one workbench."""
    app = ClientApp()
    bench_of = workbenches()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        site = ConfigRecord({"client": client_of(context)})
        return Message(RecordDict({"site": site}), reply_to=message)

    @app.train()
    @guarded
    def train(message: Message, context: Context) -> Message:
        from client import wire, work

        bench = bench_of(context)
        state, instruction = wire.read_request(message, bench)
        store = FeedbackStore(site_folder(context))
        update = work.local_update(bench, client_of(context), state, instruction, store)
        if update is None:
            return wire.status_reply(message, "no-data")
        return wire.update_reply(message, update, instruction)

    @app.evaluate()
    @guarded
    def evaluate(message: Message, context: Context) -> Message:
        from client import wire, work

        bench = bench_of(context)
        state, instruction = wire.read_request(message, bench)
        if instruction.stage < 0:  # asked of every client, once, before a second task
            TaskStore(site_folder(context)).forget()
        counts = work.local_evaluation(bench, client_of(context), state, instruction)
        return wire.evaluation_reply(message, counts)

    return app


def client_of(context: Context) -> int:
    """The client's stable number: which share of the data is its own."""
    return int(context.node_config["partition-id"])


def site_folder(context: Context) -> Path:
    """Where the client keeps what must outlive a request: its own folder, or, in a simulation,
    one inside the run folder."""
    if "state-dir" in context.node_config:
        return Path(str(context.node_config["state-dir"]))
    out = str(context.run_config.get("run.out", "")) or f"deal-run-{context.run_id}"
    return Path(out) / "sites" / str(client_of(context))


def workbenches() -> Callable[[Context], Workbench]:
    """Return a lookup that keeps the workbench of the latest experiment."""
    kept: list[tuple[UserConfig, Workbench]] = []

    def bench_of(context: Context) -> Workbench:
        from client.workbench import Workbench

        if kept and kept[0][0] == context.run_config:
            return kept[0][1]
        experiment = without_run_folder(from_run_config(context.run_config))
        if not kept or kept[0][1].experiment != experiment:
            kept[:] = [(context.run_config, Workbench(experiment))]
        return kept[0][1]

    return bench_of


def without_run_folder(experiment: Experiment) -> Experiment:
    """The experiment as far as a client may depend on it."""
    run = experiment.run.model_copy(update={"out": "", "resume": False, "engine": "inprocess"})
    return experiment.model_copy(update={"run": run})


def guarded(handler: Handler) -> Handler:
    """Answer a fault with a code: an exception's text may hold private data."""

    def answer(message: Message, context: Context) -> Message:
        from client import wire

        try:
            return check_reply(handler(message, context))
        except PayloadError as error:
            log.error("request refused: %s", error)
            return wire.status_reply(message, "refused")
        except Exception:
            log.exception("request failed")
            return wire.status_reply(message, "failed")

    return answer


app = make_app()
