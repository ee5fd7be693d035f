"""Gradients of groups of examples, clipped and summed: for a unit of privacy of many examples.

A group's gradient is the mean of those of its examples; it is clipped as a whole, and added to the
others. So a group, however many examples it has, adds at most ``max_grad_norm`` to the sum. The
mean, not the sum: every group counts alike, a bound that suits single records suits groups, and a
group of equal records adds what one of them would.

The examples of a group follow each other, over as many passes as they take. Only one group is open
at a time, so memory holds the gradients of a pass and of one group, whatever the size of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from deal_core.training.objective import Objective
from deal_core.training.per_sample import (
    ExampleGradients,
    SharedFactor,
    clip_factors,
    example_gradients,
    gradient_norms,
)


def clipped_group_gradients(
    module: nn.Module,
    objective: Objective,
    microbatches: Sequence[Sequence[int]],
    groups: Sequence[int],
    max_grad_norm: float,
) -> Tensor:
    """Add ``sum_u m_u min(1, C / ||m_u||)`` to the gradient of every trainable factor, where
    ``m_u`` is the mean gradient of the examples of group ``u`` that are in the batch.

    What an example does to the arithmetic stays within its group: a pass in which a gradient is not
    finite, or that fails, is taken again example by example, and an example that fails alone adds
    nothing to its group.

    Args:
        module: holds the adapter; factors that do not require a gradient get none.
        objective: as for :func:`~deal_core.training.per_sample.clipped_gradients`.
        microbatches: the batch, cut up anywhere; the examples of a group follow each other.
        groups: number of the group of every position in the data.
        max_grad_norm: ``C``, over all factors of all layers together (flat clipping). A group whose
            mean is not finite adds nothing.

    Returns:
        ``||m_u||`` before clipping, ``(groups in the batch,)``, in their order; private, for tests
        alone.

    Raises:
        ValueError: the examples of a group do not follow each other, so that it would be clipped in
            parts; or a loss reaches a factor by another way than its example's copy.

    Source: docs/method.md (M27); Charles et al., arXiv 2407.07737 (user-level sampling).
    """
    sums = _GroupSums(max_grad_norm)
    for microbatch in microbatches:
        if microbatch:
            _add(module, objective, microbatch, groups, sums)
    return sums.finish()


def _add(
    module: nn.Module,
    objective: Objective,
    microbatch: Sequence[int],
    groups: Sequence[int],
    sums: _GroupSums,
) -> None:
    """Add a pass to the sums of its groups; example by example, where it gives no numbers."""
    gradients: ExampleGradients = []
    try:
        gradients = example_gradients(module, objective, microbatch)
        finite = bool(gradient_norms(gradients).isfinite().all())
    except SharedFactor:
        raise
    except Exception:
        finite = False
    if finite or len(microbatch) == 1:
        sums.add(gradients if finite else [], [groups[position] for position in microbatch])
        return
    for position in microbatch:
        _add(module, objective, [position], groups, sums)


class _GroupSums:
    """The sum of clipped groups, and the one group that is still open."""

    def __init__(self, max_grad_norm: float) -> None:
        self._bound = max_grad_norm
        self._open: int | None = None
        self._examples = 0
        self._held: dict[nn.Parameter, Tensor] = {}
        """Factor to the sum over the examples of the open group so far, ``(1, *factor)``."""
        self._begun: set[int] = set()
        self._norms: list[Tensor] = []

    def add(self, gradients: ExampleGradients, numbers: Sequence[int]) -> None:
        """Add the examples of one pass, whose groups these are; without gradients: examples that
        add nothing to theirs. All groups but the last are then complete."""
        runs = [(number, len(list(members))) for number, members in groupby(numbers)]
        sizes = [size for _, size in runs]
        sums = _sums(gradients, sizes)
        begun = [number for number, _ in runs]
        if begun[0] == self._open:
            begun = begun[1:]
            sizes[0] += self._examples
            for factor, held in self._held.items():
                sums[factor] = _with_first(sums.get(factor), held, len(runs))
        else:
            self.finish()
        self._begin(begun)
        self._close({factor: total[:-1] for factor, total in sums.items()}, sizes[:-1])
        self._open, self._examples = runs[-1][0], sizes[-1]
        self._held = {factor: total[-1:].clone() for factor, total in sums.items()}

    def finish(self) -> Tensor:
        """Close the open group; return the norms of all so far."""
        if self._open is not None:
            self._close(self._held, [self._examples])
        self._open, self._examples, self._held = None, 0, {}
        return torch.cat(self._norms) if self._norms else torch.empty(0)

    def _begin(self, numbers: Sequence[int]) -> None:
        if self._begun.intersection(numbers) or len(set(numbers)) < len(numbers):
            raise ValueError("the examples of a group do not follow each other")
        self._begun.update(numbers)

    def _close(self, sums: Mapping[nn.Parameter, Tensor], sizes: Sequence[int]) -> None:
        """Clip the means of groups of these sizes, and add them to the factors' gradients."""
        if not sizes:
            return
        means = {factor: _divided(total, sizes) for factor, total in sums.items()}
        norms = torch.zeros(len(sizes))
        if means:
            norms = torch.stack([mean.flatten(1).norm(dim=1) for mean in means.values()])
            norms = norms.norm(dim=0)
        finite = norms.isfinite()
        scales = clip_factors(norms, self._bound)
        for factor, mean in means.items():
            mean[~finite] = 0.0  # its scale is no number either
            part = torch.einsum("n,nij->ij", torch.where(finite, scales, 0.0), mean)
            factor.grad = part if factor.grad is None else factor.grad.add_(part)
        self._norms.append(norms.cpu())


def _sums(gradients: ExampleGradients, sizes: Sequence[int]) -> dict[nn.Parameter, Tensor]:
    """Return factor to the sums over examples that follow each other, so many in each,
    ``(len(sizes), *factor)``."""
    sums: dict[nn.Parameter, Tensor] = {}
    for factor, copy in gradients:
        if copy.grad is not None:
            counts = torch.tensor(sizes, device=copy.device)
            slots = torch.arange(len(sizes), device=copy.device).repeat_interleave(counts)
            start = copy.grad.new_zeros(len(sizes), *factor.shape)
            sums[factor] = start.index_add_(0, slots, copy.grad)
    return sums


def _with_first(total: Tensor | None, held: Tensor, groups: int) -> Tensor:
    """Return the sums of so many groups, with what is held of the first added to it."""
    if total is None:
        total = held.new_zeros(groups, *held.shape[1:])
    total[:1] += held
    return total


def _divided(total: Tensor, sizes: Sequence[int]) -> Tensor:
    return total / torch.tensor(sizes, device=total.device, dtype=total.dtype).view(-1, 1, 1)
