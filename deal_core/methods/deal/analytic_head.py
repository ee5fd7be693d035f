"""The analytic head of deal: class means and a shared covariance of the *adapted* encoder, taken
in one round at the end of a task; those of earlier classes follow the drift of the features.

What a task does to the features of earlier classes is not seen: their texts are gone. It is
estimated on the texts of the task itself, as the linear map that leads from their embeddings at the
start of the task to those at its end, shrunk towards the identity: (M43) of docs/method.md. Counts,
sums and Gram matrix of earlier classes are mapped with it. Sources: Yu et al. 2020 (drift of
prototypes from current data); Gomez-Villa et al. 2024 (a learnt map).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from deal_core.config.method import PrototypeConfig
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.methods.interface import EmbeddedTask, Phase, Statistics, Tensors
from deal_core.methods.shared import class_sums
from deal_core.methods.shared.class_sums import COUNT, GRAM, ROUNDING, SUM, symmetric, triangle
from deal_core.methods.shared.frozen import no_objective
from deal_core.methods.shared.prototypes import absorb

PROTOTYPES = "prototypes"
"""Name of the phase."""
START_GRAM, CROSS = "start_gram", "cross"


def shapes(labels: int, size: int) -> Mapping[str, tuple[int, ...]]:
    """Return name to shape: the class sums of the model now; the Gram matrix of the model at the
    start of the task, and the products of both."""
    own = class_sums.shapes(labels, size)
    return {**own, START_GRAM: own[GRAM], CROSS: (size, size)}


def collect(task: EmbeddedTask) -> Tensors:
    """Return the class sums, ``start_gram`` as ``gram`` of the model at the start of the task, and
    ``cross`` ``(size, size)``: ``sum_x now(x) start(x)^T``. float64."""
    now, start = task.embeddings.double(), task.start().double()
    extra = {START_GRAM: triangle(start.T @ start), CROSS: now.T @ start}
    return {**class_sums.collect(task), **extra}


def check(sums: Tensors) -> None:
    """Check that unit vectors can have these sums.

    Raises:
        PayloadError: as for class sums; or products that no two sets of unit vectors have.
    """
    class_sums.check(sums)
    n, size = float(sums[COUNT].sum()), sums[SUM].shape[1]
    now, start = symmetric(sums[GRAM], size), symmetric(sums[START_GRAM], size)
    if abs(float(start.trace()) - n) > class_sums.TOLERANCE * n:
        raise PayloadError("start_gram: its trace is not the number of examples")
    if float(sums[CROSS].norm()) > n * (1 + class_sums.TOLERANCE):
        raise PayloadError("cross: larger than so many unit vectors can make it")
    both = torch.cat([torch.cat([now, sums[CROSS]], 1), torch.cat([sums[CROSS].T, start], 1)])
    if float(torch.linalg.eigvalsh(both)[0]) < -ROUNDING * n:
        raise PayloadError("cross: of no vectors that have these Gram matrices")


def drift(totals: Mapping[str, Tensors], ridge: float) -> Tensor:
    """Return the map ``(size, size)`` from embeddings at the start of the task to those now: the
    least squares of (M43), shrunk towards the identity.

    Args:
        totals: task to its sums.
        ridge: in units of the mean eigenvalue of the Gram matrix at the start.
    """
    cross = torch.stack([total[CROSS] for total in totals.values()]).sum(dim=0)
    size = len(cross)
    start = symmetric(torch.stack([t[START_GRAM] for t in totals.values()]).sum(dim=0), size)
    eye = torch.eye(size, dtype=cross.dtype)
    shrunk = start + ridge * start.trace() / size * eye
    return eye + torch.linalg.solve(shrunk, (cross - start).T).T


def mapped(sums: Mapping[str, Tensor], by: Tensor) -> dict[str, Tensor]:
    """Return the class sums that embeddings have after the linear map."""
    after = dict(sums)
    for key, value in sums.items():
        if key.startswith(f"{SUM}/"):
            after[key] = value @ by.T
    if GRAM in sums:
        after[GRAM] = triangle(by @ symmetric(sums[GRAM], len(by)) @ by.T)
    return after


def absorb_drifted(state: State, totals: Mapping[str, Tensors], config: PrototypeConfig) -> State:
    """Return the state whose sums of earlier classes have followed the drift, with those of the
    round added, and all heads made anew; at the server."""
    if totals and state.sums and config.drift_ridge:
        by = drift(totals, config.drift_ridge)
        state = replace(state, sums=mapped(state.sums, by))
    return absorb(state, totals, config)


def prototype_phases(config: PrototypeConfig) -> tuple[Phase, ...]:
    """The phase, where the experiment wants it."""
    if not config.enabled:
        return ()
    statistics = Statistics(
        shapes=shapes,
        collect=collect,
        check=check,
        absorb=lambda state, totals: absorb_drifted(state, totals, config),
        once=True,
    )
    return (
        Phase(
            PROTOTYPES,
            1,
            no_objective,
            lambda state: state,
            lambda state: True,
            statistics=statistics,
        ),
    )
