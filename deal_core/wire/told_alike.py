"""What all sites of a sum are asked alike: the model that they begin from, and what to do with it.

A sum hides one site's summand among others. It would not if the others were given a model from
which nothing is learnt, so each site makes this digest of what it was sent, and masks nothing
beside sites with another one. Source: Pasquini et al., CCS 2022, arXiv 2111.07380.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from deal_core.lora.arrays import to_arrays
from deal_core.lora.state import State
from deal_core.wire.instruction import Instruction, read_instruction

OF_ONE_CLIENT = frozenset({"past", "piggybacked_evaluation", "distilled", "distilled_rank"})
"""Fields of an instruction that need not be equal: its own past, counts that are in no sum with the
update, and how the retained adapter travelled, which is compared itself."""
OF_ITS_TASK = frozenset({"task", "seen"})
"""Likewise, where each client has its own order of tasks."""


def told_alike(instruction: Instruction, state: State, own_tasks: bool) -> str:
    """Return a digest, hexadecimal, of a request as far as it is the same for all.

    Args:
        instruction: of the request.
        state: that it brings, as it is decoded.
        own_tasks: whether each client works on a task of its own.
    """
    apart = OF_ONE_CLIENT | (OF_ITS_TASK if own_tasks else frozenset())
    apart |= {"learnt"} if instruction.task else frozenset()  # of the counts
    arrived = read_instruction(instruction.to_config())  # empty lists do not travel
    asked = arrived.model_dump(mode="json", exclude=set(apart))
    hashed = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    parts = {"current": state.current, "retained": state.retained, "residual": state.residual}
    for name, adapter in parts.items():
        hashed.update(_digest(name, {} if adapter is None else to_arrays(adapter)))
    heads = {task: head.detach().cpu().numpy() for task, head in state.heads.items()}
    hashed.update(_digest("heads", heads))
    return hashed.hexdigest()


def _digest(name: str, arrays: Mapping[str, ArrayLike]) -> bytes:
    """Of named arrays as float32; both zeros are one, since rows of zeros are not sent."""
    hashed = hashlib.sha256(name.encode())
    for key in sorted(arrays):
        values = np.asarray(arrays[key], np.float32) + np.float32(0)
        hashed.update(json.dumps([key, values.shape]).encode())
        hashed.update(np.ascontiguousarray(values).tobytes())
    return hashed.digest()
