"""Class means: label heads from class sums with noise; the answer is the nearest class mean in
angle, in public directions.

They are those of the *frozen* base model, beside the adapted model's scores of label names. Nothing
moves its features: sums over earlier tasks stay true whatever is learnt, and tell tasks apart; the
adapter, which learns within a task, tells its labels apart. Source: docs/method.md, (M43), (M44),
(M62), (M69).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from deal_core.config.experiment import PrototypeConfig
from deal_core.deal.interface import Phase, Statistics, SumContext, Tensors
from deal_core.lora.state import State
from deal_core.models.fast.prompt_forest import QUARTER
from deal_core.training.public_subspace import lifted

COUNT, SUM = "count", "sum"
"""Of the records of each label, and of their vectors: what class sums are."""
SMALLEST = 1e-3
"""Length that a class mean is taken to have at least."""
SCALE = 4.0
"""Length of a row of a head, for each square root of its entries: beside log-probabilities of
names."""
LABEL_NAME_PRIOR = 200.0
"""Records that a label's name counts for where the noise has the length of a vector and labels have
one record: more with the variance of the noise, less with the mean number of records."""
CENTRE, DIRECTIONS = "centre", "directions"
"""Of the public subspace, beside the sums."""
PROTOTYPES = "prototypes"
"""Name of the phase in which ``deal`` takes class sums."""


def sum_phases(config: PrototypeConfig, routes: bool = False) -> tuple[Phase, ...]:
    """Return the phase in which sums are taken, of a router or not, where the experiment wants
    it."""
    if config.enabled != "on":
        return ()
    statistics = class_statistics(config, names=True)
    if routes:
        statistics = replace(statistics, layers=QUARTER, routes=True)
    return (Phase(PROTOTYPES, 1, statistics=statistics),)


def class_statistics(config: PrototypeConfig, names: bool = False) -> Statistics:
    """Return what clients add up, and what the server makes of it; ``names``: whether label names'
    scores by the adapted model count beside those of class means."""
    return Statistics(
        absorb=partial(absorb, projected=config.directions > 0),
        once=True,
        layers=config.layers,
        directions=config.directions,
        noise_multiplier=config.noise_multiplier,
        names=names,
    )


def absorb(
    state: State, totals: Mapping[str, Tensors], known: SumContext, projected: bool
) -> State:
    """Return the state with the heads of tasks from their noisy class sums, at the server;
    ``projected``: these are in public directions, which are kept beside them."""
    assert known.subspace is not None
    made = {
        task: noised_head(total[COUNT], total[SUM], known.names[task], known.deviation)
        for task, total in totals.items()
    }
    sums = dict(state.sums)
    if projected:
        sums |= {CENTRE: known.subspace.centre, DIRECTIONS: known.subspace.scaled}
    return replace(state, heads={**state.heads, **made}, sums=sums)


def noised_head(count: Tensor, total: Tensor, names: Tensor, deviation: float) -> Tensor:
    """Return the head of a task, ``(labels, size + 1)``, float32: (M62), (M69).

    Class means have one length: noise makes them longer, and those of few records most. ``count``
    and ``total`` of each label have noise of a ``deviation`` in each entry, in lengths of a vector.
    """
    prior = LABEL_NAME_PRIOR * deviation**2 / max(1.0, float(count.mean()))
    means = (total + prior * names.to(total.dtype)) / (count.clamp(min=1.0) + prior)[:, None]
    means = torch.where(count[:, None] + prior > 0, means, names.to(total.dtype))
    lengths = means.norm(dim=1, keepdim=True).clamp(min=SMALLEST)
    rows = SCALE * math.sqrt(means.shape[1]) * means / lengths
    return torch.cat([rows, torch.zeros(len(rows), 1).double()], dim=1).float()


def whole_heads(state: State) -> dict[str, Tensor]:
    """Return the heads of a state as they score whole embeddings, ``(labels, size + 1)``: what
    scores coordinates in public directions is the same there."""
    if DIRECTIONS not in state.sums:
        return dict(state.heads)
    return {
        task: lifted(head, state.sums[CENTRE], state.sums[DIRECTIONS])
        for task, head in state.heads.items()
    }
