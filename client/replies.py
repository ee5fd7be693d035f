"""What the app does with a request for an update, and with one for counts of right answers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from flwr.app import Message

from client import wire
from client.distilled_store import DistilledStore
from client.faults import counts_or_error
from client.gate import as_allowed, require_allowed
from client.local_evaluation import local_evaluation
from client.local_update import local_update
from client.received import Received
from client.reply_cache import UpdateStore
from client.secure.masked_input import (
    Maskable,
    as_arrays,
    maskable_counts,
    maskable_update,
    summed_arrays,
)
from client.state import folder_of, forget
from client.status_reply import secure_reply
from client.verdict import verdict
from deal_core.config.experiment import counts_in_sum
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.wire.instruction import LEARN, Instruction

if TYPE_CHECKING:
    from client.client_context import ClientContext
    from deal_core.privacy.interface import Counts, LocalUpdate


def evaluation_reply(received: Received) -> Message:
    """Return the counts that the request asks for; masked, where they leave in a secure sum.

    Raises:
        PayloadError: the request is none.
        Refusal, OutsidePolicy, ProtocolError: by the client's own rules there are no counts.
    """
    client, bench, message = received.client, received.bench, received.message
    state, instruction = wire.read_request(message, bench, DistilledStore(client.folder))
    if instruction.task:
        raise PayloadError("instruction: an evaluation is of no one task")
    if instruction.phase != LEARN:
        worse = verdict(bench, received.client_context(), state, instruction)
        return wire.verdict_reply(message, worse)
    # Asked of every client, once, before a second stage. A site has a folder for each run.
    if instruction.stage < 0 and client.site is None:
        forget(folder_of(client.folder, ""))
    name = wire.request_name(message, instruction, received.run)
    if not counts_in_sum(bench.experiment):
        client_context = received.client_context()
        counts = local_evaluation(bench, client_context, state, instruction, name)
        return wire.evaluation_reply(message, counts)
    today = client.as_of_today(name)
    maskable = maskable_counts(client, bench, message, state, instruction, today)
    maskable.require()
    client_context = received.client_context()
    counts = local_evaluation(bench, client_context, state, instruction, name, masked=True)
    return secure_reply(message, maskable.masked(as_arrays(counts), bench.experiment.run.seed))


def training_reply(received: Received) -> Message:
    """Return the update that the request asks for, with the counts that go along; in a secure sum
    masked. Whether it may be is settled before anything is counted, trained or charged.

    Raises:
        PayloadError: the request is none.
        Refusal, OutsidePolicy, ProtocolError: by the client's own rules there is no update.
    """
    client, bench, message = received.client, received.bench, received.message
    state, instruction = wire.read_request(message, bench, DistilledStore(client.folder))
    client_context = received.client_context()
    require_allowed(bench, client_context, instruction)
    name = wire.request_name(message, instruction, received.run)
    today = client.as_of_today(name)
    maskable = None
    sites = 0
    if bench.masked(instruction.phase):
        maskable = maskable_update(client, bench, message, state, instruction, today)
        maskable.require()
        sites = maskable.sites
    counts = _counts(received, client_context, state, instruction)
    learn = partial(local_update, bench, client_context, state, instruction, name, sites)
    if client.site is None:
        update = learn()
    else:
        kept = UpdateStore(client.folder).once(today, instruction, learn)
        update = as_allowed(kept, client_context.site.policy, maskable is not None)
    if maskable is not None:
        return _masked(received, maskable, update, state, instruction, counts)
    return wire.update_reply(message, update, instruction, counts)


def _counts(
    received: Received, client_context: ClientContext, state: State, instruction: Instruction
) -> tuple[str, Counts] | None:
    """Return code and counts of the evaluation that goes along; None: none does."""
    if not instruction.piggybacked_evaluation:
        return None
    asked = instruction.evaluation()
    name = wire.request_name(received.message, asked, received.run)
    count = partial(local_evaluation, received.bench, client_context, state, asked, name)
    return counts_or_error(received.message, received.context, count)


def _masked(
    received: Received,
    maskable: Maskable,
    update: LocalUpdate,
    state: State,
    instruction: Instruction,
    counts: tuple[str, Counts] | None,
) -> Message:
    bench, simulated = received.bench, received.client.site is None
    arrays = summed_arrays(bench, state, instruction, update, maskable.layout, simulated)
    masked = maskable.masked(arrays, bench.experiment.run.seed)
    return wire.secure_update_reply(received.message, update.figures, instruction, counts, masked)
