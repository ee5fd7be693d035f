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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from deal_core.lora.learnt import learning_by_key
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.interface import RecordId
from deal_core.privacy.mechanisms.groups import Groups
from deal_core.privacy.mechanisms.guards import (
    require_moved,
    require_plain_lora,
    require_same_answers,
)
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.privacy.mechanisms.sampled_units import (
    clipped_total,
    clipping_bound,
    drawn_batch,
    rehearse_clipping,
    require_drawn,
)
from deal_core.training.gradients import Probes
from deal_core.training.objective import Objective

GRID_BITS = 30
"""A clipping bound is ``2^30`` steps of the grid that gradients are summed on."""


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

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """Take a clipped gradient over constant texts, and drop it.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had.
            ValueError: a loss reads a factor itself, or no gradient is finite.
        """
        rehearse_clipping(module, objective, probes, self.max_grad_norm)

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
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
