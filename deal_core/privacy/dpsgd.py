"""A step of DP-SGD: clipped and noised gradients on Poisson samples.

Every record is in a step's batch with the same probability, independently (Poisson sampling). Its
gradient, of its own loss alone, is clipped to ``max_grad_norm`` over all trained factors together;
noise of ``noise_multiplier * max_grad_norm`` is added to the sum; the sum is divided by the
expected batch size, whatever size the batch has. A step on an empty batch is noise. What reads no
data (the objective's penalty, weight decay, the optimiser, maps that make factors) comes after the
noise and costs nothing.

Where groups of records are protected, a group takes the place of a record: it is drawn whole, the
mean gradient of its records is clipped, and the sum is divided by the expected number of groups. A
record that is protected by itself is a group of one.

Source: docs/method.md (M27), (M66); Abadi et al., CCS 2016, algorithm 1; Charles et al., arXiv
2407.07737 (user-level sampling).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from scipy.special import bdtrc
from torch import Tensor, nn

from deal_core.lora import attach
from deal_core.lora.linear import adapted_forward
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.interface import Probes, RecordId, UpdateRequest
from deal_core.privacy.noise import NoiseSource
from deal_core.privacy.record_gradients import record_gradients

GRID_BITS = 30
"""A clipping bound is ``2^30`` steps of the grid that gradients are summed on."""
BELOW = 1 - 1e-9
"""Factor that covers what products in float64 may be off by."""
IMPOSSIBLE = 1e-15
"""Probability below which something did not happen by chance."""
TOLERANCE = 1e-5
"""Relative difference of scores that rounding may make."""


class UnsafeModel(RuntimeError):
    """A guarantee would not be one, or a model would silently not learn."""


@dataclass(frozen=True)
class Groups:
    """Which examples are protected together: ``numbers``, the group of every example, from 0, none
    left out."""

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


def require_sampled(
    batch: Sequence[int], record_ids: Sequence[RecordId], groups: Groups, sample_rate: float
) -> None:
    """Check that a batch, positions in the data, can be a Poisson sample of the rate that is
    charged.

    Raises:
        UnsafeModel: a record is in it twice, and would count twice; a group is in it in part; or it
            has more of them than such a sample ever has (in one of 1e15).
    """
    if len({record_ids[position] for position in batch}) != len(batch):
        raise UnsafeModel("a record is in a batch twice")
    drawn = {groups.numbers[position] for position in batch}
    if sum(len(groups.members[number]) for number in drawn) != len(batch):
        raise UnsafeModel("a group is in a batch in part")
    if drawn and bdtrc(len(drawn) - 1, len(groups), sample_rate) < IMPOSSIBLE:
        raise UnsafeModel(f"a batch of {len(drawn)} is larger than the sample rate allows")


def require_planned(ask: UpdateRequest, groups: Sequence[int], planned: int) -> None:
    """Check, before any step, that what is about to be read is what was planned, so many records,
    or groups, of the task, and is charged.

    Raises:
        UnsafeModel: a record twice, one of another task than the charge names, or another number
            of records, or groups, than the plan's.
    """
    if {len(ask.record_ids), len(groups)} != {len(ask.data)}:
        raise UnsafeModel("examples of which it is not known whose record they are")
    if len(set(ask.record_ids)) != len(ask.record_ids):
        raise UnsafeModel("a record is in the data twice")
    if any(each.task != ask.task for each in ask.record_ids):
        raise UnsafeModel("a record of another task than the one that is charged")
    if len(set(groups)) != planned:
        unit = "records" if ask.groups is None else "groups"
        raise UnsafeModel(f"{len(set(groups))} {unit}, but {planned} are planned")


@dataclass(frozen=True)
class BoundedSum:
    """A sum over records: noise is added to nothing else, and is as large as its sensitivity asks
    for."""

    value: Mapping[str, Tensor]
    """Name to entries, in steps of the grid, int64; a name that no record reached is left out."""
    sensitivity: float
    """By how much a record, or group, that is added or removed changes all entries together (L2),
    at most."""
    step: float
    """Distance of neighbours on the grid, in the unit of the sensitivity."""


@dataclass
class Sampled:
    """What may be read of a client's data, and how it is hidden; of steps and of sums."""

    data: Sequence[Encoded]
    record_ids: Sequence[RecordId]
    """Which record each of the data is."""
    _: KW_ONLY
    sample_rate: float
    """Probability that an example, or group, is drawn."""
    noise_multiplier: float
    """Standard deviation of the noise in clipping bounds."""
    max_grad_norm: float
    noise: NoiseSource
    """Of samples and gradients."""
    groups: Groups = None  # type: ignore[assignment]
    """Of the data; where none are given each example is protected by itself."""

    def __post_init__(self) -> None:
        if self.groups is None:
            self.groups = Groups(range(len(self.data)))

    def draw(self) -> list[int]:
        """Return positions of a Poisson sample; it may be empty. A group comes whole."""
        taken = self.noise.uniform(len(self.groups)) <= self.sample_rate
        return self.groups.batch(taken.nonzero().flatten().tolist())

    def clipped(
        self, module: nn.Module, objective: attach.ExampleLosses, batch: Sequence[int], bits: int
    ) -> BoundedSum:
        """Return the sum of the batch's clipped gradients, rounded to a grid of ``2^-bits`` of the
        clipping bound, by name of factor.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had, or the batch is
                no sample of the rate that is charged.
        """
        entries = sum(factor.numel() for factor in require_plain_lora(module))
        require_sampled(batch, self.record_ids, self.groups, self.sample_rate)
        bound = clipping_bound(self.max_grad_norm, entries, bits)
        step = self.max_grad_norm / 2**bits
        total = clipped_gradients(module, objective, batch, self.groups.numbers, bound, step).total
        return BoundedSum(total, self.max_grad_norm, step)

    def rehearse(self, module: nn.Module, objective: attach.ExampleLosses, probes: int) -> None:
        """Take a clipped gradient over constant texts, and drop it.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had.
        """
        factors, bound = require_plain_lora(module), self.max_grad_norm
        total = clipped_gradients(module, objective, range(probes), range(probes), bound, bound)
        for factor in factors:
            factor.grad = None
        if not all(map(math.isfinite, total.norms)):
            raise UnsafeModel("the model has no gradient on constant texts")


@dataclass
class PrivateGradients(Sampled):
    """Clipped and noised gradients on Poisson samples: so many steps, which are known before
    anything is drawn."""

    steps: int
    expected_batch: float
    """What the noisy sum is divided by; public."""
    _before: list[Tensor] = field(default_factory=list)
    _taken: int = 0

    def batches(self) -> Iterator[list[int]]:
        """A Poisson sample a step; it may be empty."""
        for _ in range(self.steps):
            yield self.draw()

    def accumulate(
        self, module: nn.Module, objective: attach.ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add ``(sum_i clip(g_i) + noise) / expected_batch``; of groups, ``g_i`` is the mean over
        the records of one.

        Returns:
            0: the loss stays unknown.

        Raises:
            UnsafeModel: as :meth:`Sampled.clipped`.
            ValueError: gradients are there already, and would go unclipped.
        """
        factors = require_plain_lora(module)
        if any(factor.grad is not None for factor in factors):
            raise ValueError("gradients are there before those of the batch")
        if self._taken == 0:
            self._before = [factor.detach().clone() for factor in factors]
        found = self.clipped(module, objective, batch, GRID_BITS)
        for key, factor in attach.learning_factors(module).items():
            noised = self._noised(found, key, factor.shape)
            factor.grad = (noised / self.expected_batch).to(factor.device, factor.dtype)
        return 0.0

    def _noised(self, found: BoundedSum, name: str, shape: torch.Size) -> Tensor:
        """Return one tensor of the sum with a Gaussian draw on each entry, float64."""
        total = self.noise_multiplier * found.sensitivity * self.noise.normal(shape)
        if name in found.value:
            total += found.step * found.value[name].double().cpu()
        return total

    def stepped(self, module: nn.Module) -> None:
        """Check, once, that the first step, which has noise, has moved some factor.

        Raises:
            UnsafeModel: it has not.
        """
        self._taken += 1
        if self._taken == 1:
            now = require_plain_lora(module)
            if all(map(torch.equal, now, self._before)):
                raise UnsafeModel("a step with noise has changed nothing")
            self._before = []

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """Check that the adapter, read and put back, is the model that was trained; on constant
        texts: what is found on them tells nothing of a record that the noised update does not.
        Where answers are no single labels, their losses are compared.

        Raises:
            UnsafeModel: it is not.
        """

        def answers() -> Tensor:
            if probes[0].target >= 0:
                return model.scores(probes, labels)
            return model.forward_train(probes, labels, ()).example_losses

        with torch.no_grad():
            trained = answers()
            attach.write(model.module, attach.read(model.module))
            again = answers()
        if not torch.allclose(trained, again, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            raise UnsafeModel("the adapter that was read is not the model that was trained")


def require_plain_lora(module: nn.Module) -> list[Tensor]:
    """Return the trainable factors, if nothing else learns and each is known by example.

    Raises:
        UnsafeModel: something learns that is no ordinary LoRA factor of a linear layer in our own
            operation: its gradient would escape the clipping.
    """
    known: dict[int, Any] = {}
    for name, layer in attach.lora_layers(module).items():
        forward = getattr(layer.forward, "func", None)
        factors = layer.lora_A[attach.CURRENT], layer.lora_B[attach.CURRENT]
        linear = all(isinstance(factor, nn.Linear) for factor in factors)
        if not linear or forward is not adapted_forward:
            raise UnsafeModel(f"layer {name} is no plain LoRA layer")
        known |= {id(factor.weight): factor.weight for factor in factors}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UnsafeModel(f"{name} learns, but is no plain LoRA factor")
    learning: list[Tensor] = [factor for factor in known.values() if factor.requires_grad]
    if not learning:
        raise UnsafeModel("nothing learns")
    return learning


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
class ClippedSum:
    """The sum so far, of gradients that are clipped over all their tensors together."""

    bound: float
    """To what each is clipped before it is rounded."""
    step: float
    """Distance of neighbours on the grid."""
    total: dict[str, Tensor] = field(default_factory=dict)
    """Name to the sum, in steps of the grid, int64."""
    norms: list[float] = field(default_factory=list)
    """Before clipping; NaN: there was none. Private: for tests and tuning on public data alone."""

    def add(self, gradient: attach.Gradient) -> None:
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
    objective: attach.ExampleLosses,
    examples: Sequence[int],
    groups: Sequence[int],
    bound: float,
    step: float,
) -> ClippedSum:
    """Return ``sum_u m_u min(1, C / ||m_u||)``, where ``m_u`` is the mean gradient, each computed
    alone, of the examples of group ``u`` that are in the batch. An example whose gradient is not
    finite, or that fails, counts as zero within its group.

    Args:
        module: holds the adapter; factors that do not require a gradient get none.
        objective: whose losses of single examples are differentiated.
        examples: positions in the data; those of a group follow each other.
        groups: number of the group of every position in the data.
        bound: ``C``, over all that learns together (flat clipping).
        step: of the grid.

    Raises:
        ValueError: the examples of a group do not follow each other, so that it would be clipped in
            parts.
    """
    runs = [list(members) for _, members in groupby(examples, key=lambda i: groups[i])]
    if len({groups[members[0]] for members in runs}) < len(runs):
        raise ValueError("the examples of a group do not follow each other")
    total = ClippedSum(bound, step)
    gradients = record_gradients(module, objective, examples)
    for members in runs:
        total.add(_mean(gradients, len(members)))
    return total


def _mean(gradients: Iterator[attach.Gradient], members: int) -> attach.Gradient:
    sums: dict[str, Tensor] = {}
    for gradient in [next(gradients) for _ in range(members)]:
        if members == 1 or all(bool(each.isfinite().all()) for each in gradient.values()):
            for name, values in gradient.items():
                own = values.double() / members
                sums[name] = sums[name] + own if name in sums else own
    return sums
