"""Noise that the sites of a secure sum make together: each adds its share, and the sum has the
whole.

One step of DP-SGD whose sum runs over all sites: each clips the gradients of its own Poisson
sample, rounds each to a grid of ``2^-16`` of the clipping bound and adds a discrete Gaussian to
their sum. The shares of the sites that are counted on make up the whole noise. Rounding may move a
gradient by half a step of the grid in each entry, so it is clipped by that much tighter. The
optimiser is at the server, after the noise.

Class sums take the same way: a record adds its embedding to the sum of its label, and
:data:`COUNT_WEIGHT` to the count of it. So it changes one row, by the length of the two together,
which is clipped as a gradient is; a group changes it by the clipped mean over its records.

The sum over sites is all that is seen. Up to a factor ``exp(+-gap)`` its density is that of a
rounded continuous Gaussian, so its cost is the Gaussian's and ``2 * gap`` a release: (M60) of
docs/method.md has the theorem and its proof.

Sources: docs/method.md, (M58) to (M60), (M62); Kairouz, Liu & Steinke, ICML 2021, arXiv 2102.06387,
theorem 2 (the sum of discrete Gaussians); Canonne, Kamath & Steinke, NeurIPS 2020, arXiv 2004.00010
(one of them).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.config.privacy import PrivacyConfig
from deal_core.lora.attach import ExampleLosses, learning_factors
from deal_core.privacy.dpsgd import BoundedSum, Groups, Sampled, clipping_bound, require_sampled
from deal_core.privacy.noise import discrete_gaussian
from deal_core.privacy.policy import Policy, in_sum
from deal_core.secure_sum.terms import LEAST_SITES, threshold

GRID_BITS = 16
"""A clipping bound is ``2^16`` steps of the grid."""
COUNT_WEIGHT = 0.25
"""What a record adds to its label's count, in lengths of an embedding (1 at most): a count needs to
be known less well than a sum."""
SUMS = "sums"
"""Name of the one tensor of class sums."""
NOBODY_TRUSTED = "nobody outside the client is trusted"
UNLIKELY = 1e-30
"""Probability of noise so long that the bound on the gap says nothing."""


@dataclass
class NoisySum(Sampled):
    """One noisy sum of a site; its noise multiplier is that of the sum over all sites, 0: no
    noise."""

    shares: int
    """Of so many sites the noise makes up the whole."""

    def total(self, module: nn.Module, objective: ExampleLosses) -> dict[str, NDArray[np.int64]]:
        """Return key of each trained factor to its noisy sum, in steps of the grid.

        Raises:
            UnsafeModel: as :meth:`~deal_core.privacy.dpsgd.Sampled.clipped`.
        """
        found = self.clipped(module, objective, self.draw(), GRID_BITS)
        return {
            key: self._noised(found, key, tuple(own.shape))
            for key, own in learning_factors(module).items()
        }

    def class_sums(
        self, embeddings: Tensor, targets: Tensor, labels: int, first: int = 0
    ) -> NDArray[np.int64]:
        """Return noisy sums of embeddings by label and, in the last column, counts, ``(labels,
        size + 1)``, in steps of the grid.

        Args:
            embeddings: of some of the data, one after the other, ``(examples, size)``.
            targets: their labels, ``(examples,)``.
            labels: how many there are.
            first: place of the first of them in the data; with groups all data are summed.

        Raises:
            UnsafeModel: the batch is no sample of the rate that is charged.
        """
        drawn, places = self.draw(), range(first, first + len(embeddings))
        require_sampled(drawn, self.record_ids, self.groups, self.sample_rate)
        batch = [place - first for place in drawn if place in places]
        shape = (labels, embeddings.shape[1] + 1)
        bound = clipping_bound(self.max_grad_norm, math.prod(shape), GRID_BITS)
        step = grid_step(self.max_grad_norm)
        total = clipped_class_sums(embeddings, targets, labels, batch, self.groups, bound, step)
        found = BoundedSum({SUMS: total}, self.max_grad_norm, step)
        return self._noised(found, SUMS, shape)

    def _noised(self, found: BoundedSum, name: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Return one tensor of the sum with this site's share of the noise, in steps of the
        grid."""
        total = np.zeros(shape, np.int64)
        if name in found.value:
            total += found.value[name].cpu().numpy()
        whole = self.noise_multiplier * (found.sensitivity / found.step)
        if sigma := whole / math.sqrt(self.shares):
            total += discrete_gaussian(math.prod(shape), sigma, self.noise).reshape(shape)
        return total


def grid_step(max_grad_norm: float) -> float:
    """Return the distance of neighbours on the grid, in the unit of the clipping bound."""
    return max_grad_norm / 2**GRID_BITS


def clipped_class_sums(
    embeddings: Tensor,
    targets: Tensor,
    labels: int,
    batch: Sequence[int],
    groups: Groups,
    bound: float,
    step: float,
) -> Tensor:
    """Return the sum over a batch of what each record, or group, adds: ``(labels, size + 1)``, in
    steps of a grid, int64; the last column counts.

    Args:
        embeddings: of all records, ``(records, size)``.
        targets: labels, ``(records,)``.
        labels: how many there are.
        batch: positions of the records that are in the sum; a group's all or none.
        groups: of all records.
        bound: to what a record's, or group's, part is clipped before it is rounded to the step.
        step: of the grid.
    """
    places = torch.tensor(list(batch), dtype=torch.long)
    vectors = embeddings[places].double()
    counts = torch.full((len(places), 1), COUNT_WEIGHT, dtype=torch.float64)
    vectors, rows = torch.cat([vectors, counts], dim=1), targets[places]
    total = torch.zeros(labels, embeddings.shape[1] + 1, dtype=torch.int64)
    if len(groups) == len(groups.numbers):  # each by itself changes one row
        return total.index_add_(0, rows, _clipped(vectors, bound, step))
    numbers = torch.tensor([groups.numbers[place] for place in batch], dtype=torch.long)
    for number in sorted(set(numbers.tolist())):
        own = numbers == number
        one = torch.zeros(total.shape, dtype=torch.float64)
        one = one.index_add_(0, rows[own], vectors[own]) / int(own.sum())
        total += _clipped(one.reshape(1, -1), bound, step).reshape(total.shape)
    return total


def _clipped(vectors: Tensor, bound: float, step: float) -> Tensor:
    """Return the rows, each at most ``bound`` long, in steps of the grid, int64; one that is not
    finite as zeros."""
    vectors = torch.where(vectors.isfinite().all(dim=1, keepdim=True), vectors, 0.0)
    lengths = vectors.norm(dim=1, keepdim=True)
    return (vectors * (bound / lengths.clamp(min=bound)) / step).round().to(torch.int64)


def slack_of(noise_multiplier: float, shares: int, entries: int) -> float:
    """Return what a release of so many entries costs because the noise of a sum, in clipping
    bounds, is not quite a Gaussian's: (M60)."""
    return 2 * density_gap(noise_multiplier * 2**GRID_BITS, shares, max(1, entries))


def shares_without_mechanism(members: int, colluding: int) -> int:
    """Return of how many sites the noise of class sums must suffice under no mechanism: of those
    that may be left of so many members, without those that may collude."""
    return max(1, max(LEAST_SITES, threshold(members, colluding)) - colluding)


def density_gap(sigma: float, shares: int, dimensions: int) -> float:
    """Return the largest absolute logarithm of the ratio of two densities, outside of a set of
    probability :data:`UNLIKELY`: of the sum of discrete Gaussians of equal variance, with a
    standard deviation ``sigma`` in steps of the grid, and of a rounded Gaussian of the same
    variance, in independent dimensions. Draws with floating-point numbers add to that set what they
    hardly give: below 1e-18 for 1,000 numbers.

    Raises:
        ValueError: a share has a standard deviation below 1: its sum is no Gaussian's.
    """
    share = sigma / math.sqrt(shares)
    if share < 1:
        raise ValueError("the grid is too coarse for the noise")
    longest = math.sqrt(dimensions) * (1 + 1 / (2 * sigma)) + math.sqrt(2 * math.log(1 / UNLIKELY))
    rounding = max(dimensions / 8, longest**2 / 24) / sigma**2
    exponent = -2 * math.pi**2 * share**2
    adding = sum(10 * math.exp(exponent * k / (k + 1)) for k in range(1, shares))
    normaliser = 3 * math.exp(-2 * math.pi**2 * sigma**2)
    drawing = shares * 2.0**-48  # some dozen draws a share, each right to 2^-52
    return rounding + dimensions * (adding + normaliser + drawing)


def trust_in_sum(privacy: PrivacyConfig, policy: Policy | None = None) -> str:
    """Return whom an epsilon takes to be honest where noise is in the sum; at a site whose
    ``policy`` takes the keys of the others from the server, that one as well, in this."""
    others = (
        f"all sites but {privacy.colluding}, which may pool what they know with the server; "
        f"at most {privacy.dropouts} fail in a round, or it is lost"
    )
    if policy is None or not policy.server_vouches_for_peers:
        return others
    return f"{others}; the server, which passes on the keys of sites, poses as none of them"


def whom_to_trust(privacy: PrivacyConfig) -> str:
    """Return whom an epsilon takes to be honest; empty: there is no epsilon."""
    if privacy.mechanism == "none":
        return ""
    return trust_in_sum(privacy) if in_sum(privacy) else NOBODY_TRUSTED
