"""A client's masked input of a sum: a local update or counts of right answers as one vector.

One for a place in the run, on the disk before it leaves.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from client.identity import ClientRequest
from client.secure_legs import SecureStore, conditions, request_of
from deal_core.config.experiment import at_server
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import to_arrays
from deal_core.methods import is_class_incremental
from deal_core.privacy.interface import LocalUpdate
from deal_core.protection import sum_terms
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum import site_round
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.messages import MaskRequest
from deal_core.wire import secure_layout
from deal_core.wire.records import count_names
from deal_core.wire.tensors import EXACT


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
    # The conditions are from the settings that the vector is made with: earlier legs may have come
    # with others.
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
