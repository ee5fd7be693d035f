"""A step of DP-SGD: clipped and noised gradients on Poisson samples.

Every record is in a step's batch with the same probability, independently (Poisson sampling). Its
gradient, of its own loss alone, is clipped to ``max_grad_norm`` over all trained factors together;
noise of ``noise_multiplier * max_grad_norm`` is added to the sum; the sum is divided by the
expected batch size, whatever size the batch has. A step on an empty batch is noise. What reads no
data (the objective's penalty, weight decay, the optimiser, maps that make factors) comes after the
noise and costs nothing.

Where groups of records are protected, a group takes the place of a record: it is drawn whole, the
mean gradient of its records is clipped, and the sum is divided by the expected number of groups.

Source: docs/method.md (M27); Abadi et al., CCS 2016, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from scipy.special import bdtrc
from torch import Tensor, nn

from deal_core.lora.attach import learning_by_key
from deal_core.lora.per_example import ExampleLosses, Gradient, gradient_alone
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.guards import (
    UnsafeModel,
    require_moved,
    require_plain_lora,
    require_same_answers,
)
from deal_core.privacy.interface import Probes, RecordId
from deal_core.privacy.noise import NoiseSource

GRID_BITS = 30
"""A clipping bound is ``2^30`` steps of the grid that gradients are summed on."""


BELOW = 1 - 1e-9
"""What products in float64 may be off by."""


IMPOSSIBLE = 1e-15
"""Probability below which something did not happen by chance."""


@dataclass(frozen=True)
class Groups:
    """Attributes: ``numbers``, the group of every example, from 0, none left out."""

    numbers: Sequence[int]

    @cached_property
    def members(self) -> list[list[int]]:
        """Positions of the examples of every group, ``[group][example]``."""
        found: dict[int, list[int]] = {}
        for position, number in enumerate(self.numbers):
            found.setdefault(number, []).append(position)
        if sorted(found) != list(range(len(found))):
            raise UnsafeModel("groups that are not numbered from 0")
        return [found[number] for number in range(len(found))]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.members)

    def batch(self, drawn: Sequence[int]) -> list[int]:
        """Return the positions of all examples of the groups that were drawn, each once, those of a
        group one after the other."""
        return [position for number in drawn for position in self.members[number]]

    def require_sampled(self, batch: Sequence[int], sample_rate: float) -> None:
        """Check that a batch can be a Poisson sample of groups of the rate that is charged.

        Args:
            batch: positions in the data.
            sample_rate: probability of a group, as it is charged.

        Raises:
            UnsafeModel: an example is in it twice, a group is in it in part, or it has more groups
                than such a sample ever has (in one of 1e15).
        """
        drawn = {self.numbers[position] for position in batch}
        if len(set(batch)) != len(batch):
            raise UnsafeModel("a record is in a batch twice")
        if sum(len(self.members[number]) for number in drawn) != len(batch):
            raise UnsafeModel("a group is in a batch in part")
        if drawn and bdtrc(len(drawn) - 1, len(self), sample_rate) < IMPOSSIBLE:
            raise UnsafeModel(f"a batch of {len(drawn)} groups is more than the sample rate allows")


def drawn_batch(
    data: Sequence[Encoded], groups: Groups | None, sample_rate: float, noise: NoiseSource
) -> list[int]:
    """Return positions of a Poisson sample; it may be empty. A group comes whole.

    Args:
        data: the examples.
        groups: of the examples; None: each is protected by itself.
        sample_rate: probability of an example, or group.
        noise: of the draw.
    """
    units = len(data) if groups is None else len(groups)
    taken = noise.uniform(units) <= sample_rate
    drawn: list[int] = taken.nonzero().flatten().tolist()
    return drawn if groups is None else groups.batch(drawn)


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


def require_sampled(
    batch: Sequence[int], record_ids: Sequence[RecordId], sample_rate: float
) -> None:
    """Check that a batch can be a Poisson sample of the rate that is charged.

    Args:
        batch: positions in the data.
        record_ids: which record each position holds.
        sample_rate: probability of a record, as it is charged.

    Raises:
        UnsafeModel: a record is in it twice, and would count twice; or it is larger than such a
            sample ever is (in one of 1e15).
    """
    if len({record_ids[position] for position in batch}) != len(batch):
        raise UnsafeModel("a record is in a batch twice")
    if batch and bdtrc(len(batch) - 1, len(record_ids), sample_rate) < IMPOSSIBLE:
        raise UnsafeModel(f"a batch of {len(batch)} is larger than the sample rate allows")


def rehearse_clipping(
    module: nn.Module, objective: ExampleLosses, probes: int, bound: float
) -> None:
    """Take a clipped gradient over so many constant texts, and drop it.

    Raises:
        UnsafeModel: something learns whose gradient per example cannot be had.
        ValueError: a loss reads a factor itself, or no gradient is finite.
    """
    factors = require_plain_lora(module)
    total = clipped_gradients(module, objective, range(probes), bound, bound)
    for factor in factors:
        factor.grad = None
    if not all(map(math.isfinite, total.norms)):
        raise UnsafeModel("the model has no gradient on constant texts")


def clipped_total(
    module: nn.Module,
    objective: ExampleLosses,
    groups: Groups | None,
    batch: Sequence[int],
    bound: float,
    step: float,
) -> ClippedSum:
    """Return the sum of clipped gradients, of groups the clipped means of theirs.

    Args:
        module: holds the adapter.
        objective: whose losses of single examples are differentiated.
        groups: of the examples; None: each by itself.
        batch: positions in the data.
        bound: of each gradient.
        step: of the grid.
    """
    if groups is None:
        return clipped_gradients(module, objective, batch, bound, step)
    return clipped_group_gradients(module, objective, batch, groups.numbers, bound, step)


def clipping_bound(max_grad_norm: float, entries: int, bits: int) -> float:
    """Return the bound of a gradient over so many entries at which a sum that is rounded to a grid
    of ``2^-bits`` changes by ``max_grad_norm`` at most, where a record is added or removed.

    Raises:
        UnsafeModel: rounding takes all of it.

    Source: docs/method.md (M66): rounding moves an entry by half a step at most.
    """
    bound = max_grad_norm * (BELOW - math.sqrt(entries) / 2 ** (bits + 1))
    if bound <= 0:
        raise UnsafeModel(f"{entries} entries are too many for a grid of 2^-{bits}")
    return bound


@dataclass
class PrivateGradients:
    """Clipped and noised gradients on Poisson samples.

    Attributes:
        data: the client's own examples.
        record_ids: which record each of them is.
        sample_rate: probability that an example, or group, is in a batch.
        noise_multiplier: see the module.
        max_grad_norm: clipping bound.
        steps: known before anything is drawn.
        expected_batch: what the noisy sum is divided by; public.
        noise: of samples and gradients.
        groups: of the examples; None: each is protected by itself.
    """

    data: Sequence[Encoded]
    record_ids: Sequence[RecordId]
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    expected_batch: float
    noise: NoiseSource
    groups: Groups | None = None
    _before: list[Tensor] = field(default_factory=list)
    _taken: int = 0

    def batches(self) -> Iterator[list[int]]:
        """A Poisson sample a step; it may be empty."""
        for _ in range(self.steps):
            yield drawn_batch(self.data, self.groups, self.sample_rate, self.noise)

    def rehearse(self, module: nn.Module, objective: ExampleLosses, probes: int) -> None:
        """Take a clipped gradient over constant texts, and drop it.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had.
            ValueError: a loss reads a factor itself, or no gradient is finite.
        """
        rehearse_clipping(module, objective, probes, self.max_grad_norm)

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add ``(sum_i clip(g_i) + noise) / expected_batch``; of groups, ``g_i`` is the mean over
        the records of one.

        Returns:
            0: the loss stays unknown.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had, or the batch is
                no sample of the rate that is charged.
            ValueError: gradients are there already, and would go unclipped.
        """
        factors = require_plain_lora(module)
        require_drawn(batch, self.record_ids, self.groups, self.sample_rate)
        if any(factor.grad is not None for factor in factors):
            raise ValueError("gradients are there before those of the batch")
        if self._taken == 0:
            self._before = [factor.detach().clone() for factor in factors]
        step = self.max_grad_norm / 2**GRID_BITS
        entries = sum(factor.numel() for factor in factors)
        bound = clipping_bound(self.max_grad_norm, entries, GRID_BITS)
        found = clipped_total(module, objective, self.groups, batch, bound, step).total
        scale = self.noise_multiplier * self.max_grad_norm
        for key, factor in learning_by_key(module).items():
            total = scale * self.noise.normal(factor.shape)
            if key in found:
                total += step * found[key].double().cpu()
            factor.grad = (total / self.expected_batch).to(factor.device, factor.dtype)
        return 0.0

    def stepped(self, module: nn.Module) -> None:
        """Check, once, that the first step has moved the factors.

        Raises:
            UnsafeModel: it has not.
        """
        self._taken += 1
        if self._taken == 1:
            require_moved(require_plain_lora(module), self._before)
            self._before = []

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """Check that the adapter, read and put back, is the model that was trained.

        Raises:
            UnsafeModel: it is not.
        """
        require_same_answers(model, probes, labels)


@dataclass
class ClippedSum:
    """The sum so far.

    Attributes:
        bound: to what each gradient is clipped, over all its tensors together, before it is
            rounded.
        step: distance of neighbours on the grid.
        total: name to the sum, in steps of the grid, int64.
        norms: of the gradients before clipping; NaN: there was none. Private: for tests, and tuning
            on public data, alone.
    """

    bound: float
    step: float
    total: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)

    def add(self, gradient: Gradient) -> None:
        """Add one gradient, clipped and rounded; one that is not finite, or missing, adds
        nothing."""
        exact = {name: values.detach().double() for name, values in gradient.items()}
        norm = math.sqrt(math.fsum(float(values.square().sum()) for values in exact.values()))
        self.norms.append(norm if exact else math.nan)
        if not exact or not math.isfinite(norm):
            return
        shortened = self.bound / norm if norm > self.bound else 1.0
        for name, values in exact.items():
            whole = (values * shortened / self.step).round().to(torch.int64)
            self.total[name] = self.total[name] + whole if name in self.total else whole


def clipped_gradients(
    module: nn.Module,
    objective: ExampleLosses,
    examples: Sequence[int],
    bound: float,
    step: float,
) -> ClippedSum:
    """Return ``sum_i g_i min(1, C / ||g_i||)``, each ``g_i`` computed alone.

    Args:
        module: holds the adapter; factors that do not require a gradient get none.
        objective: whose losses of single examples are differentiated; its penalty is not part
            of it (a penalty reads no data: its gradient is added after the noise).
        examples: positions in the data.
        bound: ``C``, over all that learns together (flat clipping).
        step: of the grid.

    Raises:
        SharedFactor: a loss reaches a factor by another way than its example's copy.

    Source: Abadi et al., CCS 2016, algorithm 1; docs/method.md (M66).
    """
    total = ClippedSum(bound, step)
    for example in examples:
        total.add(gradient_alone(module, objective, example))
    return total


def clipped_group_gradients(
    module: nn.Module,
    objective: ExampleLosses,
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
        objective: as for :func:`clipped_gradients`.
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


def _mean(module: nn.Module, objective: ExampleLosses, members: Sequence[int]) -> Gradient:
    """The mean gradient of a group, in float64."""
    sums: dict[str, Tensor] = {}
    for example in members:
        gradient = gradient_alone(module, objective, example)
        if all(bool(values.isfinite().all()) for values in gradient.values()):
            for name, values in gradient.items():
                own = values.double() / len(members)
                sums[name] = sums[name] + own if name in sums else own
    return sums
