"""A local update as a client's part of a secure sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from client.context import RequestContext
from client.resources import Workbench
from client.secure_legs import masked_reply
from deal_core.lora.arrays import to_arrays
from deal_core.lora.state import State
from deal_core.privacy.interface import LocalUpdate
from deal_core.secure_sum.weighted import weighted_values
from deal_core.wire.instruction import Instruction
from deal_core.wire.secure_layout import EXAMPLES, layout_of, within_bounds


def masked_update(
    place: RequestContext,
    bench: Workbench,
    message: Message,
    state: State,
    instruction: Instruction,
    update: LocalUpdate,
    name: str,
) -> bytes:
    """Return the masked vector of an update.

    Args:
        place: which client.
        bench: whose experiment it is.
        message: has the round's mask request.
        state: what the client began from.
        instruction: what was asked.
        update: trained factors, or their gradient sums in whole numbers.
        name: of the request that it answers.

    Raises:
        ProtocolError: the mask request is refused.
    """
    config, gradients = bench.experiment, EXAMPLES in update.arrays
    layout = layout_of(config, state.current, frozenset(instruction.trained), gradients)
    arrays = dict(update.arrays) if gradients else _weighted(bench, state, update)
    where = instruction.stage, instruction.server_round
    return masked_reply(place, config, message, name, layout, arrays, where)


def _weighted(bench: Workbench, state: State, update: LocalUpdate) -> dict[str, NDArray[Any]]:
    """Return the change of every trained factor times the weight, and the weight: examples as a
    share of those that count whole."""
    before = to_arrays(state.current)
    change = {
        key: np.asarray(value, np.float64) - before[key] for key, value in update.arrays.items()
    }
    most = bench.experiment.aggregation.secure_examples
    weight = min(1.0, update.figures["num_examples"] / most)
    return weighted_values(within_bounds(change), weight)
