"""Counts of right answers as a client's part of a secure sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from client.context import RequestContext
from client.resources import Workbench
from client.secure.legs import conditions
from client.secure.mask import Maskable, told_here
from deal_core.lora.state import State
from deal_core.models import has_label_logits
from deal_core.privacy.interface import Counts
from deal_core.wire.counts import count_names
from deal_core.wire.instruction import Instruction
from deal_core.wire.secure_layout import counts_layout


def maskable_counts(
    place: RequestContext,
    bench: Workbench,
    message: Message,
    state: State,
    instruction: Instruction,
    name: str,
) -> Maskable:
    """Return what an evaluation request asks to be added to a sum."""
    names = count_names(has_label_logits(bench.experiment.model))
    sites = bench.experiment.federation.clients
    basis = told_here(place, bench.experiment, instruction, state)
    layout = counts_layout(names, len(instruction.tasks), sites, basis)
    asked = conditions(place, bench.experiment)
    return Maskable(place, message, layout, asked, f"evaluate {instruction.stage}", name)


def as_arrays(counts: Counts) -> Mapping[str, NDArray[Any]]:
    """Return the counts as the fields of the layout."""
    return {name: np.asarray(values, np.float64) for name, values in counts.items()}
