"""A request for counts of right answers, and the reply: what the app does with ``evaluate``."""

from __future__ import annotations

from flwr.app import Message

from client import wire
from client.distilled_store import DistilledStore
from client.local_evaluation import local_evaluation
from client.received import Received
from client.secure.masked_input import as_arrays, maskable_counts
from client.state import folder_of, forget
from client.status_reply import secure_reply
from client.verdict import verdict
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import counts_in_sum
from deal_core.wire.instruction import LEARN


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
