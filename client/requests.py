"""A request for an update, or for counts of right answers: read, with the checks of the client's
side, and answered; in a secure sum with a masked vector, of a place in the run one, which is on the
disk before it leaves."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from client.egress import IN_THE_SUM, METRICS
from client.gate import authorize, require
from client.identity import STATUS, Client, ClientRequest, status_reply
from client.local_evaluation import local_evaluation, verdict
from client.local_training import local_update
from client.runtime import ClientRuntime
from client.secure_exchanges import SecureStore, conditions, request_of, secure_reply
from client.state import forget, load_retained, save_retained, update_once
from deal_core.config.experiment import at_server, counts_in_sum
from deal_core.lora.adapter import Adapter, padded, zero_adapter
from deal_core.lora.payload import HEADS, LORA, RESIDUAL, RETAINED, WORSE, PayloadError
from deal_core.lora.state import State, to_arrays
from deal_core.methods import is_class_incremental
from deal_core.privacy.interface import LocalUpdate
from deal_core.privacy.policy import figures_allowed
from deal_core.protection import sum_terms
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum import site_round
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.messages import MaskRequest
from deal_core.wire import secure_layout
from deal_core.wire.instruction import LEARN, RECORD, Instruction, read_instruction
from deal_core.wire.records import REPLY, SECURE, count_names, record_digest
from deal_core.wire.tensors import EXACT, read_heads, require_bounded, tasks_in, unpack


def evaluation_reply(message: Message, client: Client, runtime: ClientRuntime) -> Message:
    """Return the counts that the request asks for; masked, where they leave in a secure sum.

    Raises:
        PayloadError: the request is none.
        Refusal, ProtocolError: by the client's own rules there are no counts.
    """
    request = read_request(message, client, runtime)
    instruction, in_sum = request.instruction, request.masked
    if instruction.task:
        raise PayloadError("instruction: an evaluation is of no one task")
    if instruction.phase != LEARN:
        require(request.asked(), "names", "verdict")
        return counts_reply(message, {WORSE: int(verdict(request))})
    # Asked of every client, once, before a second stage. A site has a folder for each run.
    if instruction.stage < 0 and client.simulated:
        forget(client.kept)
    require(request.asked(), "names", "counts in a sum" if in_sum else "counts")
    if not in_sum:
        counts = local_evaluation(request)
        return counts_reply(message, {key: list(values) for key, values in counts.items()})
    maskable = maskable_counts(request, message)
    counts = local_evaluation(request, masked=True)
    arrays = {key: np.asarray(values, np.float64) for key, values in counts.items()}
    return secure_reply(message, maskable.masked(arrays))


def training_reply(message: Message, client: Client, runtime: ClientRuntime) -> Message:
    """Return the update that the request asks for; in a secure sum masked. Whether it may be is
    settled before anything is trained or charged.

    Raises:
        PayloadError: the request is none.
        Refusal, ProtocolError: by the client's own rules there is no update.
    """
    granted = read_request(message, client, runtime)
    authorization = authorize(granted.asked(), lambda: runtime.mechanism)
    maskable = maskable_update(granted, message) if granted.masked else None
    sites = maskable.sites if maskable is not None else 0
    learn = partial(local_update, granted, authorization, sites)
    instruction = granted.instruction
    if client.simulated:
        kept = learn()
    else:
        kept = update_once(client.folder, client.as_of_today(granted.name), instruction, learn)
    # One that was charged before, too, leaves with the figures that may leave today alone.
    figures = figures_allowed(kept.figures, client.policy, granted.masked)
    update = replace(kept, figures=figures)
    masked = None
    if maskable is not None:
        masked = maskable.masked(summed_arrays(granted, update, maskable.layout))
    return update_reply(message, update, instruction, masked)


def read_request(message: Message, client: Client, runtime: ClientRuntime) -> ClientRequest:
    """Return a request as it was read: what is asked, and the server's state as it brings it.

    Raises:
        PayloadError: a record too many or too few, or anything in one that is not expected.
        RetainedMissing: it relies on a retained adapter that is not in the client's folder.
    """
    content = message.content
    if RECORD not in content.config_records:
        raise PayloadError("no instruction")
    instruction = read_instruction(dict(content.config_records[RECORD]))
    if instruction.phase not in runtime.phases:
        raise PayloadError(f"instruction: no phase {instruction.phase[:40]!r}")
    phase, config = runtime.phases[instruction.phase], runtime.experiment
    if instruction.task:  # sums over records always leave in a secure sum
        masked = config.aggregation.secure or phase.statistics is not None
    else:  # what sites think of class means they say one by one
        masked = instruction.phase == LEARN and counts_in_sum(config)
    others = {RECORD, SECURE} if masked else {RECORD}
    arrays = dict(content.array_records)
    wanted = {LORA, RESIDUAL} if instruction.residual_rank else {LORA}
    if HEADS in arrays and runtime.statistics is not None:
        wanted.add(HEADS)
    if set(content) != {*arrays, *others} or set(arrays) - {RETAINED} != wanted:
        raise PayloadError(f"records {sorted(content)}, expected {sorted({*wanted, *others})}")
    sent = arrays.get(RETAINED)
    if sent is None:
        arrays[RETAINED] = load_retained(client.folder, instruction.retained_digest)
    elif record_digest(sent) != instruction.retained_digest:
        raise PayloadError("retained: not what the instruction names")
    basis = (
        instruction.retained_digest,
        instruction.retained_rows,
        instruction.rank,
        instruction.retained_rank,
        instruction.residual_rank,
        instruction.num_reference_directions,
        instruction.components,
    )
    raw = [
        {key: (a.dtype, a.shape, a.stype, a.data) for key, a in arrays[name].items()}
        for name in sorted(wanted)
    ]
    decode = partial(_state, arrays, runtime, instruction)
    state: State = runtime.latest.get_or_compute("state", (basis, raw), decode)
    if sent is not None:
        save_retained(client.folder, sent)
    # Equal only for what is the same to the byte, in one run: other settings make another answer.
    hashed = hashlib.blake2b(digest_size=32)
    hashed.update(json.dumps(client.run).encode())
    hashed.update(json.dumps(instruction.to_config(), sort_keys=True).encode())
    for name, record in sorted(content.array_records.items()):
        if name != RETAINED:  # the instruction names it
            hashed.update(f"{name} {record_digest(record)} ".encode())
    named = hashed.hexdigest()
    return ClientRequest(client, runtime, instruction, phase, state, named, masked)


def _state(
    arrays: Mapping[str, ArrayRecord], runtime: ClientRuntime, instruction: Instruction
) -> State:
    config, scaling = runtime.experiment.adapter, runtime.experiment.adapter.lora_alpha
    current = _adapter(arrays[LORA], runtime, instruction.rank, scaling / instruction.rank)
    most = max(2 * config.retained_rank + config.rank, instruction.retained_rows)
    if instruction.retained_rank > most:  # rows that are not sent cost the sender nothing
        raise PayloadError(f"instruction: more than {most} retained rows")
    sent = _adapter(arrays[RETAINED], runtime, instruction.retained_rows, 1.0)
    retained, residual = padded(sent, instruction.retained_rank), None
    if instruction.residual_rank:
        residual = _adapter(arrays[RESIDUAL], runtime, instruction.residual_rank, 1.0)
    places = instruction.num_reference_directions
    state = State(current, retained, residual, places, components=instruction.components)
    if HEADS not in arrays:
        return state
    statistics = runtime.statistics
    assert statistics is not None  # else the record was refused
    rounded = statistics.rounds(runtime.experiment.wire.dtype)
    tasks, size = tasks_in(arrays[HEADS], rounded), statistics.size(runtime.experiment.model)
    if not set(tasks) <= set(runtime.tasks):
        raise PayloadError("heads: a task that is not of this run")
    shapes = {task: (statistics.classes(runtime.labels(task)), size + 1) for task in tasks}
    return replace(state, heads=read_heads(arrays[HEADS], shapes, rounded))


def _adapter(record: ArrayRecord, runtime: ClientRuntime, rank: int, scaling: float) -> Adapter:
    dtype = runtime.experiment.wire.dtype
    adapter = unpack(record, dtype, zero_adapter(runtime.shapes, rank, scaling))
    require_bounded(adapter)
    return adapter


def update_reply(
    message: Message, update: LocalUpdate, instruction: Instruction, masked: bytes | None = None
) -> Message:
    """Return the reply with a local update; ``masked``: the vector in the place of the factors,
    beside which those figures leave that tell nothing of single records."""
    where = {name: getattr(instruction, name) for name in ("stage", "phase", "server_round")}
    content, figures = RecordDict({STATUS: ConfigRecord({"code": "ok", **where})}), update.figures
    if masked is None:
        arrays = {key: Array(np.ascontiguousarray(value)) for key, value in update.arrays.items()}
        content[LORA] = ArrayRecord(arrays)
    else:
        content[SECURE] = ConfigRecord({REPLY: masked})
        told = {name: value for name, value in figures.items() if name not in IN_THE_SUM}
        figures = {**told, "num_examples": 1.0}
    content[METRICS] = MetricRecord(dict(figures))
    return Message(content, reply_to=message)


def counts_reply(message: Message, values: Mapping[str, int | list[float]]) -> Message:
    """Return counts per task, in the order of the request; or a verdict."""
    reply = status_reply(message, "ok")
    reply.content[METRICS] = MetricRecord(dict(values))
    return reply


@dataclass(frozen=True)
class Maskable:
    """A vector that a client has been asked to add to a sum, and that it may mask."""

    granted: ClientRequest
    request: bytes
    """Of the round, for a mask."""
    layout: Layout
    place: str
    """In the run; of one place one vector is masked."""
    name: str
    """Of the request that the vector answers."""

    @property
    def sites(self) -> int:
        """How many sites are in the sum, as the mask request says."""
        return len(MaskRequest.from_bytes(self.request).mask_keys) + 1

    def masked(self, arrays: Mapping[str, NDArray[Any] | None]) -> bytes:
        """Return the masked vector: ``arrays`` has one for each field of the layout, or that it is
        covered. That it is in this sum, and in no other, is on the disk before.

        Raises:
            ProtocolError: the mask request is refused, or the vector is in another sum.
        """
        client, seed = self.granted.client, self.granted.runtime.experiment.run.seed
        generator = (
            seeded_numpy(seed, "secure rounding", client.number, self.place)
            if client.simulated
            else np.random.default_rng(secrets.randbits(128))  # the seed is the server's word
        )
        encoded, store = self.layout.encode(arrays, generator), SecureStore(client.folder)
        with store.alone():
            answered = site_round.mask(store.announced(), self.request, encoded)
            context = MaskRequest.from_bytes(self.request).context
            store.keep_used(store.used().masking(context, self.place, self.name))
            store.keep(answered.state)
        return answered.reply


def maskable_update(granted: ClientRequest, message: Message) -> Maskable:
    """Return what a training request asks to be added to a sum, checked before anything is counted,
    trained or charged; ``message`` has the round's mask request.

    Raises:
        ProtocolError: the request is refused, or a vector of this place is in a sum already.
        PayloadError: no request, not what the round's terms say, or the experiment has updates
            that are not summed as they are.
    """
    runtime, instruction, state = granted.runtime, granted.instruction, granted.state
    config, statistics = runtime.experiment, granted.phase.statistics
    basis = sum_terms(config, granted.client.asked.model.name, instruction, state)
    # Of one place in the run one update is masked: its round; of sums that a client gives once,
    # its task, whatever the phase is called, since in another round they would be the same.
    place = f"{instruction.phase} {instruction.stage} {instruction.server_round}"
    if statistics is not None:
        place = f"sums of {instruction.task}" if statistics.once else place
        tasks = instruction.tasks or (instruction.task,)
        shapes = [
            statistics.shapes(statistics.classes(runtime.labels(task)), config.model)
            for task in tasks
        ]
        layout = secure_layout.statistics_layout(config, shapes, basis)
    elif config.wire.dtype != EXACT:
        raise PayloadError(f"secure: wire.dtype '{config.wire.dtype}' is not summed")
    else:
        trained = frozenset(instruction.trained)
        layout = secure_layout.layout_of(config, state.current, trained, at_server(config), basis)
    return _maskable(granted, message, layout, place)


def maskable_counts(granted: ClientRequest, message: Message) -> Maskable:
    """Return what an evaluation request asks to be added to a sum, as :func:`maskable_update`."""
    config, instruction = granted.runtime.experiment, granted.instruction
    basis = sum_terms(config, granted.client.asked.model.name, instruction, granted.state)
    names = count_names(is_class_incremental(config))
    layout = secure_layout.counts_layout(
        names, len(instruction.tasks), config.federation.clients, basis
    )
    return _maskable(granted, message, layout, f"evaluate {instruction.stage}")


def _maskable(granted: ClientRequest, message: Message, layout: Layout, place: str) -> Maskable:
    # The conditions are from the settings that the vector is made with: earlier exchanges may have
    # come with others.
    client, request = granted.client, request_of(message)
    store, name = SecureStore(client.folder), client.as_of_today(granted.name)
    with store.alone():
        kept = store.announced()
        site_round.require_maskable(kept, request)
        context = MaskRequest.from_bytes(request).context
        terms = kept.round_of(context).terms
        conditions(client, granted.runtime.experiment).check(terms)
        if terms.layout != layout.digest:
            raise PayloadError("secure: an update of another form than the round's terms say")
        store.used().masking(context, place, name)
    return Maskable(granted, request, layout, place, name)


def summed_arrays(
    granted: ClientRequest, update: LocalUpdate, layout: Layout
) -> Mapping[str, NDArray[Any] | None]:
    """Return an array for each field of the layout, or that it is covered.

    The change of every trained factor; all sites weigh the same, whatever they hold. Where the
    layout has it, the loss as well, if the site lets it into a sum. Gradient sums, and sums of
    embeddings, go as they are, in whole numbers.
    """
    if granted.phase.statistics is not None or at_server(granted.runtime.experiment):
        return update.arrays
    start = to_arrays(granted.state.current)
    change = {key: np.asarray(each, np.float64) - start[key] for key, each in update.arrays.items()}
    bounds = {field.name: field.largest for field in layout.fields}
    values = secure_layout.within_bounds(change, max(bounds[key] for key in change))
    if secure_layout.LOSS not in bounds:
        return values
    return {**values, **secure_layout.loss_values(update.figures.get("loss"))}
