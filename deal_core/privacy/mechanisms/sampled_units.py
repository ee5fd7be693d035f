"""A Poisson sample of what is protected, records or groups, and its clipped gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deal_core.models.interface import Encoded
from deal_core.privacy.interface import RecordId
from deal_core.privacy.mechanisms.groups import Groups
from deal_core.privacy.mechanisms.guards import UnsafeModel, require_plain_lora, require_sampled
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.training.batching import sampled_passes
from deal_core.training.objective import Objective
from deal_core.training.per_group import clipped_group_gradients
from deal_core.training.per_sample import clipped_gradients


def drawn_batch(
    data: Sequence[Encoded], groups: Groups | None, sample_rate: float, noise: NoiseSource
) -> list[int]:
    """Return positions of a Poisson sample, sorted by length; it may be empty. A group comes whole.

    Args:
        data: the examples.
        groups: of the examples; None: each is protected by itself.
        sample_rate: probability of an example, or group.
        noise: of the draw.
    """
    units = len(data) if groups is None else len(groups)
    taken = noise.uniform(units) <= sample_rate
    drawn: list[int] = taken.nonzero().flatten().tolist()
    if groups is None:
        return sorted(drawn, key=lambda i: len(data[i].tokens))
    return groups.batch(drawn, data)


def require_drawn(
    batch: Sequence[int],
    record_ids: Sequence[RecordId],
    groups: Groups | None,
    sample_rate: float,
) -> None:
    """Check that a batch can be a sample of the rate that is charged.

    Raises:
        UnsafeModel: a record twice, a group in part, or more than such a sample ever has.
    """
    if groups is None:
        require_sampled(batch, record_ids, sample_rate)
    else:
        groups.require_sampled(batch, sample_rate)


def rehearse_clipping(module: nn.Module, objective: Objective, probes: int, bound: float) -> None:
    """Take a clipped gradient over so many constant texts, and drop it.

    Raises:
        UnsafeModel: something learns whose gradient per example cannot be had.
        ValueError: a loss reads a factor itself, or no gradient is finite.
    """
    factors = require_plain_lora(module)
    norms = clipped_gradients(module, objective, [list(range(probes))], bound)
    for factor in factors:
        factor.grad = None
    if norms.isnan().any():
        raise UnsafeModel("the model has no gradient on constant texts")


def add_clipped(
    module: nn.Module,
    objective: Objective,
    data: Sequence[Encoded],
    groups: Groups | None,
    batch: Sequence[int],
    tokens_per_microbatch: int,
    bound: float,
) -> None:
    """Add the sum of clipped gradients, of groups the clipped means of theirs, to every trainable
    factor's gradient.

    Args:
        module: holds the adapter.
        objective: whose losses of single examples are differentiated.
        data: the examples.
        groups: of them; None: each by itself.
        batch: positions in the data.
        tokens_per_microbatch: bounds memory, not the sum.
        bound: of each gradient.
    """
    parts = sampled_passes(module, data, batch, tokens_per_microbatch)
    if groups is None:
        clipped_gradients(module, objective, parts, bound)
    else:
        clipped_group_gradients(module, objective, parts, groups.numbers, bound)
