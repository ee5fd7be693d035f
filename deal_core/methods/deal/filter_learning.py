"""Learned gains: the retention filter's gains and centres, trained by distillation.

Source: docs/method.md (M10), (M13), ``filter = "learned"``; DEAL, arXiv 2509.18942, eqs. 9 and 12.
The student of a layer is ``U diag(rho S) V^T`` of the stack ``M = U S V^T``, with ``U`` and
``V`` fixed: ``lora_A = V^T`` is frozen, and ``lora_B = U diag(rho S) / s = M V diag(rho) / s``. So
what travels is an ordinary ``lora_B``, the mean over clients has the mean ``rho``, and a client
finds ``rho`` again by projecting what it received on the columns of ``M V``.

``rho`` is kept in [0, 1] and non-decreasing in ``S``: a filter takes away, and large directions
survive. (The penalised gains of the paper have no such bound; its own code lets them grow where
the spectrum is smallest.) Vectors of this kind form a convex set, so their mean is one too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deal_core.config.method import ConsolidationConfig, MethodConfig, RetentionConfig
from deal_core.lora.adapter import Adapter, LoraFactors, spectrum
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State
from deal_core.methods.deal.controlled_update import root_power
from deal_core.methods.deal.retention import (
    NEGLIGIBLE,
    bulk_noise,
    filtered_spectra,
    heat_kernels,
    start_kernels,
)
from deal_core.models import LanguageModel
from deal_core.training.objective import Objective
from deal_core.training.parametrization import Parametrization

POORLY_SEEN = 1e-3
"""Combinations of gains that change the filter less than this part of the strongest stay at their
start values."""


def diagonal_student(
    everything: Adapter, rank: int, scaling: float, config: RetentionConfig
) -> Adapter:
    """Return ``lora_A = V^T`` and ``lora_B = U diag(rho S) / scaling`` at the start values of the
    filter; zero rows and columns where a layer has fewer than ``rank`` directions."""
    layers = {}
    for name, parts in filtered_spectra(everything, rank, config).items():
        A, B = parts.Vh[:rank], parts.U[:, :rank] * (parts.S[:rank] / scaling)
        missing = rank - A.shape[0]
        layers[name] = LoraFactors(pad(A, (0, 0, 0, missing)).float(), pad(B, (0, missing)).float())
    return Adapter(layers, scaling)


class LayerFilter:
    """The filter of one layer: what it is made from, and what learns.

    All float64, on the CPU; ``k`` directions of the student that are not padding, strongest first.

    Attributes:
        columns: ``M V / scaling``, ``(d_out, k)``: ``lora_B`` where ``rho`` is 1.
        x: ``S / S_1``, ``(k,)``.
        start: kernels at their start values, as all clients of all rounds know them.
        gains, centres: ``(J,)``, with gradient.
        beyond: the part of the received ``rho`` that no gains can make (means over clients of
            other centres), ``(k,)``.
    """

    def __init__(
        self, teacher: LoraFactors, student: LoraFactors, scaling: float, config: RetentionConfig
    ) -> None:
        live = student.A.any(dim=1)
        A, B = student.A[live].double(), student.B[:, live].double()
        self._missing = student.A.shape[0] - A.shape[0]
        self.columns = teacher.B.double() @ (teacher.A.double() @ A.T) / scaling
        sizes = self.columns.norm(dim=0)
        S = spectrum(teacher).S
        noise = config.noise or bulk_noise(S, student.A.shape[0])
        self.start = start_kernels(S[NEGLIGIBLE * S[0] < S], noise, config)
        self.x = (scaling * sizes / S[0]).clamp(max=1.0)
        received = (self.columns * B).sum(dim=0) / sizes.square().clamp(min=1e-30)
        at_start = self._shares(self.start.centres)
        known = torch.linalg.pinv(at_start, rtol=POORLY_SEEN)
        moved = known @ (received - at_start @ self.start.gains)
        self.gains = (self.start.gains + moved).clamp(0.0, 1.0).requires_grad_()
        self.centres = self.start.centres.clone().requires_grad_()
        self.beyond = received - at_start @ self.gains.detach()

    def _shares(self, centres: Tensor) -> Tensor:
        """Part of every gain in every direction's ``rho``, ``(k, J)``; rows sum to 1."""
        phi = heat_kernels(self.x, centres, self.start.tau)
        return phi / phi.sum(dim=1, keepdim=True)

    def rho(self) -> Tensor:
        """Return the filter now, ``(k,)``, in [0, 1] and non-decreasing in ``S``.

        The gradient passes by these bounds: where one holds ``rho``, its gain can still return.
        """
        free = self._shares(self.centres) @ self.gains + self.beyond
        rising = free.detach().clamp(0.0, 1.0).flip(0).cummax(dim=0).values.flip(0)
        return free + (rising - free).detach()

    def retention_change(self) -> Tensor:
        """How far gains and centres have left their start values, ``(2 J,)``."""
        gains, centres = self.gains - self.start.gains, self.centres - self.start.centres
        return torch.cat([gains, centres])

    def spectrum_change(self) -> Tensor:
        """How far the filter has changed the spectrum in units of ``S_1``, ``(k,)``."""
        at_start = self._shares(self.start.centres) @ self.start.gains
        return (self.rho() - at_start) * self.x

    def pull_back(self, of_B: Tensor) -> None:
        """Add the gradient of ``lora_B``, ``(d_out, rank)``, to those of gains and centres."""
        live = of_B.detach()[:, : self.x.numel()].double().cpu()
        of_rho = (self.columns * live).sum(dim=0)
        self.rho().backward(of_rho)  # type: ignore[no-untyped-call]

    def bound(self) -> None:
        """Keep gains and centres where they mean something: in [0, 1]."""
        with torch.no_grad():
            self.gains.clamp_(0.0, 1.0)
            self.centres.clamp_(0.0, 1.0)

    def lora_B(self) -> Tensor:
        """Return what the model has for ``lora_B``, ``(d_out, rank)``, float32."""
        return pad(self.columns * self.rho().detach(), (0, self._missing)).float()


@dataclass(frozen=True)
class FilterLearning:
    """An objective of which only the filter learns.

    Attributes:
        objective: what the filtered student minimises.
        weights: ``lora_B`` of every layer in the model; its gradient is pulled back.
        filters: the same layers.
        config: the asymmetric penalty: weights ``lambda1``, ``lambda2`` and powers ``a``, ``b``.
    """

    objective: Objective
    weights: Mapping[str, nn.Parameter]
    filters: Mapping[str, LayerFilter]
    config: ConsolidationConfig

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return the losses of the objective on the data, ``(batch,)``."""
        return self.objective.example_losses(batch)

    def penalty(self) -> Tensor:
        """Return ``lambda1 mean|theta1 - theta1_0|^a + lambda2 mean|theta2|^b``: ``theta1`` are
        gains and centres, ``theta2`` the change of the spectrum; means over all layers. It reads no
        data."""
        filters, config = self.filters.values(), self.config
        kept = torch.cat([each.retention_change() for each in filters])
        changed = torch.cat([each.spectrum_change() for each in filters])
        return (
            config.lambda1 * root_power(kept.square(), config.a).mean()
            + config.lambda2 * root_power(changed.square(), config.b).mean()
        )

    def parametrization(self, module: nn.Module, trained: frozenset[str]) -> Parametrization:
        """Moves gains and centres, where ``lora_B`` learns."""
        pairs = [(self.weights[name], each) for name, each in self.filters.items()]
        return FilterLearner(pairs if "lora_B" in trained else [])


class FilterLearner:
    """``lora_B`` follows gains and centres."""

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, LayerFilter]]) -> None:
        self._pairs = pairs
        self.parameters = [p for _, each in pairs for p in (each.gains, each.centres)]

    def before_step(self) -> None:
        """Take the gradients of ``lora_B`` back to gains and centres."""
        for weight, each in self._pairs:
            if weight.grad is not None:
                each.pull_back(weight.grad)
            weight.grad = None

    def after_step(self) -> None:
        """Stay within bounds, and make ``lora_B`` anew."""
        for weight, each in self._pairs:
            each.bound()
            weight.data.copy_(each.lora_B())

    def finish(self) -> None:
        """All is in the model."""


def make_filter_learning(
    objective: Objective, model: LanguageModel, state: State, method: MethodConfig
) -> FilterLearning:
    """Return the objective that learns gains: the filter of every layer, from student and teacher.

    Args:
        objective: distillation from the stack.
        model: holds ``state``.
        state: the student current, the teacher (scaling 1) retained.
        method: retention (kernels, rank) and consolidation (weights and powers of (M13)).
    """
    filters = {
        name: LayerFilter(
            state.retained.layers[name], student, state.current.scaling, method.retention
        )
        for name, student in state.current.layers.items()
        if student.A.any()
    }
    layers = lora_layers(model.module)
    weights = {name: layers[name].lora_B[CURRENT].weight for name in filters}
    return FilterLearning(objective, weights, filters, method.consolidation)
