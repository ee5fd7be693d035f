"""Gradients of groups of examples, clipped and summed: for a unit of privacy of many examples.

A group's gradient is the mean of those of its examples; it is clipped as a whole, and added to the
others. So a group, however many examples it has, adds at most the bound to the sum. The mean, not
the sum: every group counts alike, a bound that suits single records suits groups, and a group of
equal records adds what one of them would.

Each example has a pass of its own, and only one group is open at a time: memory holds the gradient
of an example and of a group, whatever the size of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor, nn

from deal_core.training.clipped_sum import ClippedSum, Gradient
from deal_core.training.objective import Objective
from deal_core.training.per_sample import gradient_alone


def clipped_group_gradients(
    module: nn.Module,
    objective: Objective,
    examples: Sequence[int],
    groups: Sequence[int],
    bound: float,
    step: float,
) -> ClippedSum:
    """Return ``sum_u m_u min(1, C / ||m_u||)``, where ``m_u`` is the mean gradient of the examples
    of group ``u`` that are in the batch. An example whose gradient is not finite, or that fails,
    counts as zero within its group.

    Args:
        module: holds the adapter; factors that do not require a gradient get none.
        objective: as for :func:`~deal_core.training.per_sample.clipped_gradients`.
        examples: positions in the data; those of a group follow each other.
        groups: number of the group of every position in the data.
        bound: ``C``, over all that learns together (flat clipping).
        step: of the grid.

    Raises:
        ValueError: the examples of a group do not follow each other, so that it would be clipped in
            parts; or a loss reaches a factor by another way than its example's copy.

    Source: docs/method.md (M27), (M66); Charles et al., arXiv 2407.07737 (user-level sampling).
    """
    runs = [list(members) for _, members in groupby(examples, key=lambda i: groups[i])]
    if len({groups[members[0]] for members in runs}) < len(runs):
        raise ValueError("the examples of a group do not follow each other")
    total = ClippedSum(bound, step)
    for members in runs:
        total.add(_mean(module, objective, members))
    return total


def _mean(module: nn.Module, objective: Objective, members: Sequence[int]) -> Gradient:
    """The mean gradient of a group, in float64."""
    sums: dict[str, Tensor] = {}
    for example in members:
        gradient = gradient_alone(module, objective, example)
        if all(bool(values.isfinite().all()) for values in gradient.values()):
            for name, values in gradient.items():
                own = values.double() / len(members)
                sums[name] = sums[name] + own if name in sums else own
    return sums
