"""What a secure sum of a round adds up: changes of trained factors, or their gradient sums; or sums
of embeddings; or counts of right answers.

Both ends make the layout from what they know of the round; a message does not bring it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deal_core.config.experiment import Experiment
from deal_core.lora.adapter import Adapter
from deal_core.lora.state import learnt_shapes
from deal_core.secure_sum.layout import COVERED, Layout, SumField, finest_scale

EXAMPLES = "examples"
"""Name of the number of examples behind a site's gradient sum."""
CLASS_SUMS = "class_sums"
"""Name of a site's noisy class sums."""
MOST_RECORDS = 1e7
"""Of a site and a task: bounds an entry of a sum of unit vectors, and a count."""
SUM_BITS, UPDATE_BITS = 64, 32
"""Of a ring word: gradient sums with noise are few, updates are large."""
LARGEST_SUM = 2.0**52
"""Of an entry of a site's gradient sum with its noise, in steps of the grid; none comes near."""
LARGEST_CHANGE = 8.0
"""Of an entry of an update, from what the round began with; AdamW moves it by its rate a step."""


def layout_of(
    experiment: Experiment, adapter: Adapter, trained: frozenset[str], gradients: bool, basis: str
) -> Layout:
    """Return the layout of a round of an experiment, in which factors of the adapter learn:
    ``gradients``: of gradient sums in whole numbers and a number of examples; else of changes, and
    where no mechanism protects what is learnt from, of the losses as well. ``basis``:
    :func:`~deal_core.protection.sum_terms` of the round."""
    sites, shapes = experiment.federation.clients, learnt_shapes(adapter, trained)
    if gradients:
        shapes = {**shapes, EXAMPLES: (1,)}
        sums = tuple(SumField(name, shape, LARGEST_SUM) for name, shape in shapes.items())
        return Layout(sums, SUM_BITS, sites, basis)
    scale = finest_scale(LARGEST_CHANGE, sites, UPDATE_BITS)
    fields = [SumField(name, shape, LARGEST_CHANGE, scale) for name, shape in shapes.items()]
    if experiment.privacy.mechanism == "none":
        fields += loss_fields(UPDATE_BITS, sites)
    return Layout(tuple(fields), UPDATE_BITS, sites, basis)


def statistics_layout(
    experiment: Experiment, shapes: Sequence[Mapping[str, tuple[int, ...]]], basis: str
) -> Layout:
    """Return the layout of sums over records, named ``PLACE.NAME``: class sums in whole numbers,
    others on the finest grid; ``shapes``: of each task, name to shape of what is summed."""
    sites = experiment.federation.clients
    finest = finest_scale(MOST_RECORDS, sites, SUM_BITS)
    fields = [
        SumField(f"{place}.{name}", shape, LARGEST_SUM)
        if name == CLASS_SUMS
        else SumField(f"{place}.{name}", shape, MOST_RECORDS, finest)
        for place, own in enumerate(shapes)
        for name, shape in own.items()
    ]
    return Layout(tuple(fields), SUM_BITS, sites, basis)


def counts_layout(names: Sequence[str], tasks: int, sites: int, basis: str) -> Layout:
    """Return the layout of counts on test records, an entry a task; of whole numbers exact."""
    scale = finest_scale(MOST_RECORDS, sites, SUM_BITS)
    fields = tuple(SumField(name, (tasks,), MOST_RECORDS, scale) for name in names)
    return Layout(fields, SUM_BITS, sites, basis)


def within_bounds(
    change: Mapping[str, NDArray[Any]], bound: float
) -> dict[str, NDArray[np.float64]]:
    """Return a change, shortened as a whole where an entry is larger than the layout's bound."""
    largest = max((float(np.abs(part).max(initial=0.0)) for part in change.values()), default=0.0)
    factor = min(1.0, bound / largest) if largest > 0 else 1.0
    return {name: factor * np.asarray(part, np.float64) for name, part in change.items()}


LOSS, LOSS_KEPT = "loss", "loss_kept"
"""Fields: the loss, and 0 of a site that says its own."""
LARGEST_LOSS = 64.0
"""What is more counts as this; cross-entropy over 10^27 labels at random is less."""


def loss_fields(bits: int, sites: int) -> tuple[SumField, ...]:
    """Return the two fields; the first on the finest grid that fits."""
    scale = finest_scale(LARGEST_LOSS, sites, bits)
    return (
        SumField(LOSS, (), LARGEST_LOSS, scale, coverable=True),
        SumField(LOSS_KEPT, (), 1.0, coverable=True),
    )


def loss_values(loss: float | None) -> dict[str, NDArray[Any] | None]:
    """Return what one site adds; covered fields for None, and for what is no number."""
    if loss is None or not np.isfinite(loss):
        return {LOSS: COVERED, LOSS_KEPT: COVERED}
    return {LOSS: np.asarray(min(max(loss, 0.0), LARGEST_LOSS)), LOSS_KEPT: np.asarray(0)}


def mean_loss(sums: Mapping[str, NDArray[Any]], sites: int) -> float | None:
    """Return the mean loss of so many sites; None where a site keeps its own, where losses are not
    summed, and for what no losses can add up to."""
    if LOSS not in sums or sums[LOSS_KEPT] != 0:
        return None
    mean = float(sums[LOSS]) / sites
    return mean if 0 <= mean <= LARGEST_LOSS else None


def without_loss(sums: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the sums of all else."""
    return {name: each for name, each in sums.items() if name not in (LOSS, LOSS_KEPT)}
