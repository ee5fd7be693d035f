"""A step of DP-SGD: clipped and noised gradients on Poisson samples.

Every record is in a step's batch with the same probability, independently (Poisson sampling). Its
gradient, of its own loss alone, is clipped to ``max_grad_norm`` over all trained factors together;
noise of ``noise_multiplier * max_grad_norm`` is added to the sum; the sum is divided by the
expected batch size, whatever size the batch has. A step on an empty batch is noise. What reads no
data (the objective's penalty, weight decay, the optimiser, maps that make factors) comes after the
noise and costs nothing.

Source: docs/method.md (M27); Abadi et al., CCS 2016, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.interface import RecordId
from deal_core.privacy.mechanisms.guards import (
    UnsafeModel,
    require_moved,
    require_plain_lora,
    require_same_answers,
    require_sampled,
)
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.training.batching import sampled_passes
from deal_core.training.gradients import Probes
from deal_core.training.objective import Objective
from deal_core.training.per_sample import clipped_gradients

BELOW = 1 - 1e-5
"""Clipping keeps so far below the bound that rounding in float32 does not lead beyond it."""


@dataclass
class PrivateGradients:
    """Clipped and noised gradients on Poisson samples.

    Attributes:
        data: the client's own examples.
        record_ids: which record each of them is.
        sample_rate: probability that an example is in a batch.
        noise_multiplier: see the module.
        max_grad_norm: clipping bound.
        steps: known before anything is drawn.
        expected_batch: what the noisy sum is divided by; public.
        tokens_per_microbatch: bounds memory, not the step.
        noise: of samples and gradients.
    """

    data: Sequence[Encoded]
    record_ids: Sequence[RecordId]
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    expected_batch: float
    tokens_per_microbatch: int
    noise: NoiseSource
    _before: list[Tensor] = field(default_factory=list)
    _taken: int = 0

    def batches(self) -> Iterator[list[int]]:
        """A Poisson sample a step, sorted by length; it may be empty."""
        for _ in range(self.steps):
            drawn = self.noise.uniform(len(self.data)) <= self.sample_rate
            batch: list[int] = drawn.nonzero().flatten().tolist()
            yield sorted(batch, key=lambda i: len(self.data[i].tokens))

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """Take a clipped gradient over constant texts, and drop it.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had.
            ValueError: a loss reads a factor itself, or no gradient is finite.
        """
        factors = require_plain_lora(module)
        norms = clipped_gradients(module, objective, [list(range(probes))], self.max_grad_norm)
        for factor in factors:
            factor.grad = None
        if norms.isnan().any():
            raise UnsafeModel("the model has no gradient on constant texts")

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """Add ``(sum_i clip(g_i) + noise) / expected_batch``.

        Returns:
            0: the loss stays unknown.

        Raises:
            UnsafeModel: something learns whose gradient per example cannot be had, or the batch is
                no sample of the rate that is charged.
            ValueError: gradients are there already, and would go unclipped.
        """
        factors = require_plain_lora(module)
        require_sampled(batch, self.record_ids, self.sample_rate)
        if any(factor.grad is not None for factor in factors):
            raise ValueError("gradients are there before those of the batch")
        if self._taken == 0:
            self._before = [factor.detach().clone() for factor in factors]
        parts = sampled_passes(module, self.data, batch, self.tokens_per_microbatch)
        clipped_gradients(module, objective, parts, BELOW * self.max_grad_norm)
        scale = self.noise_multiplier * self.max_grad_norm
        for factor in factors:
            total = scale * self.noise.normal(factor.shape)
            if factor.grad is not None:
                total += factor.grad.double().cpu()
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
