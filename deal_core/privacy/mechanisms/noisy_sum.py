"""A clipped gradient sum with this site's share of the noise, in whole numbers: what a secure sum
adds up over sites.

One step of DP-SGD whose sum runs over all sites: each clips the gradients of its own Poisson
sample, rounds each to a grid of ``2^-16`` of the clipping bound and adds a discrete Gaussian to
their sum. The shares of the sites that are counted on make up the whole noise. Rounding may move a
gradient by half a step of the grid in each entry, so it is clipped by that much tighter. The
optimiser is at the server, after the noise.

Source: docs/method.md (M58) to (M60); Kairouz, Liu & Steinke, ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.lora.learnt import learnt_sizes
from deal_core.models.interface import Encoded
from deal_core.privacy.interface import RecordId
from deal_core.privacy.mechanisms.discrete_gaussian import discrete_gaussian
from deal_core.privacy.mechanisms.groups import Groups
from deal_core.privacy.mechanisms.guards import require_plain_lora
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.privacy.mechanisms.noisy_class_sums import clipped_class_sums
from deal_core.privacy.mechanisms.sampled_units import (
    clipped_total,
    clipping_bound,
    drawn_batch,
    rehearse_clipping,
    require_drawn,
)
from deal_core.training.objective import Objective

GRID_BITS = 16
"""A clipping bound is ``2^16`` steps of the grid."""


@dataclass
class NoisySum:
    """One noisy sum of a site.

    Attributes:
        data: the client's own examples.
        record_ids: which record each of them is.
        sample_rate: probability that an example is in the sum.
        noise_multiplier: of the sum over all sites, in clipping bounds; 0: no noise.
        max_grad_norm: clipping bound.
        shares: of so many sites the noise makes up the whole.
        noise: of sample and share.
        groups: of the examples; None: each is protected by itself.
    """

    data: Sequence[Encoded]
    record_ids: Sequence[RecordId]
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    shares: int
    noise: NoiseSource
    groups: Groups | None = None

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """Take a clipped gradient over constant texts, and drop it.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had.
            ValueError: a loss reads a factor itself, or no gradient is finite.
        """
        rehearse_clipping(module, objective, probes, self.max_grad_norm)

    def total(self, module: nn.Module, objective: Objective) -> dict[str, NDArray[np.int64]]:
        """Return key of each trained factor to its noisy sum, in steps of the grid.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had, or the batch is
                no sample of the rate that is charged.
        """
        factors = require_plain_lora(module)
        batch = self._batch()
        for factor in factors:
            factor.grad = None
        shapes = learnt_sizes(module)
        entries = sum(math.prod(shape) for shape in shapes.values())
        bound = clipping_bound(self.max_grad_norm, entries, GRID_BITS)
        step = grid_step(self.max_grad_norm)
        found = clipped_total(module, objective, self.groups, batch, bound, step).total
        return {
            key: _numbers(found.get(key), shape) + self._share(shape)
            for key, shape in shapes.items()
        }

    def class_sums(
        self, embeddings: Tensor, targets: Tensor, labels: int, first: int = 0
    ) -> NDArray[np.int64]:
        """Return noisy sums of embeddings by label and, in the last column, counts, ``(labels,
        size + 1)``, in steps of the grid: :mod:`~deal_core.privacy.mechanisms.noisy_class_sums`.

        Args:
            embeddings: of some of the data, one after the other, ``(examples, size)``.
            targets: their labels, ``(examples,)``.
            labels: how many there are.
            first: place of the first of them in the data; with groups all data are summed.

        Raises:
            UnsafeModel: the batch is no sample of the rate that is charged.
        """
        places = range(first, first + len(embeddings))
        batch = [place - first for place in self._batch() if place in places]
        shape = (labels, embeddings.shape[1] + 1)
        bound = clipping_bound(self.max_grad_norm, math.prod(shape), GRID_BITS)
        step = grid_step(self.max_grad_norm)
        total = clipped_class_sums(embeddings, targets, labels, batch, self.groups, bound, step)
        return _numbers(total, shape) + self._share(shape)

    def _batch(self) -> list[int]:
        """Return a sample of the data, checked."""
        batch = drawn_batch(self.data, self.groups, self.sample_rate, self.noise)
        require_drawn(batch, self.record_ids, self.groups, self.sample_rate)
        return batch

    def _share(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """This site's share of the noise."""
        sigma = self.noise_multiplier * 2**GRID_BITS / math.sqrt(self.shares)
        if not sigma:
            return np.zeros(shape, np.int64)
        return discrete_gaussian(math.prod(shape), sigma, self.noise).reshape(shape)


def _numbers(total: Tensor | None, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """A sum in steps of the grid; None: no record has any."""
    return np.zeros(shape, np.int64) if total is None else total.cpu().numpy()


def grid_step(max_grad_norm: float) -> float:
    """Return the distance of neighbours on the grid, in the unit of the clipping bound."""
    return max_grad_norm / 2**GRID_BITS
