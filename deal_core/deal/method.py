"""DEAL: cross-entropy, distillation and a price of interference; then retention.

In a task every client minimises, over the factors ``A``, ``B`` of the current adapter,

    CE(base + retained + s B A)  +  D  +  R(s B A)

    D = T^2 [weight KL(base + retained || model) over earlier labels + future_weight KL(...) over
        labels to come]
    R = lambda1 sum_k w_k iota_k^2 + lambda2 ||outside of retained directions||_F^2,

with ``lambda1 = lambda2 = 0`` (R off), ``weight = 1`` and ``future_weight = 0.25`` by default; D is
a mean over tasks, R over layers, and an exact rule's residual counts with ``retained``. At its end
the server retains the best part of rank ``retained_rank`` of ``U rho(S) V^T``, where ``U S V^T`` is
all of ``retained + residual + s B A``. With ``retention.apart`` a task has cross-entropy alone, and
an adapter of its own (:mod:`deal_core.deal.routed`).

A task starts with a fresh adapter in the orthogonal complement of what is retained; class means
answer beside the model. The size of the model does not grow with the number of tasks. Every part
has a switch. Source: docs/method.md (M4) to (M6), (M8), (M9), (M15), (M16).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig, MethodConfig, UpdateConfig
from deal_core.deal.class_means import sum_phases
from deal_core.deal.distillation import distilled
from deal_core.deal.interface import LocalTask, Phase
from deal_core.deal.objective import Penalised
from deal_core.deal.retention import RETENTIONS, retain
from deal_core.deal.routed import RoutedDeal
from deal_core.errors import choose
from deal_core.lora import adapter as lora
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State, continued, drop_task_start, snapshot_task_start
from deal_core.training.loop import Objective


@dataclass(frozen=True)
class Deal:
    """Attributes: ``adapter`` (ranks, alpha) and ``method`` (switches) of the experiment;
    ``phases``: class sums, if class means are on."""

    adapter: AdapterConfig
    method: MethodConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Return a state with a fresh current adapter, outside the retained directions unless told
        not to (M4). Without retention the adapter that is there goes on."""
        if self.method.retention.filter == "none":
            return snapshot_task_start(continued(state, self.adapter, generator))
        rank, scaling = self.adapter.rank, self.adapter.lora_alpha / self.adapter.rank
        fresh = lora.orthogonal_init(state.retained, rank, scaling, generator)
        return replace(state, current=fresh, residual=None, num_reference_directions=0)

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Return a state that retains, of both adapters stacked, the best part of rank
        ``retained_rank`` (exact while everything learnt so far fits)."""
        if self.method.retention.filter == "none":
            return drop_task_start(state)
        everything = lora.stack(state.parts())
        retained = retain(everything, self.adapter.retained_rank, self.method.retention)
        current = lora.zero_adapter(state.current.shapes, self.adapter.rank, state.current.scaling)
        return replace(
            state, current=current, retained=retained, residual=None, num_reference_directions=0
        )

    def objective(self, task: LocalTask) -> Objective:
        """Return the formula at the top of this file."""
        config = self.method.distillation
        losses = distilled(task, config, config.future_weight, True)
        if not (self.method.update.lambda1 or self.method.update.lambda2):
            return losses
        module, retained = task.model.module, task.state.retained
        device = next(module.parameters()).device
        anchors: dict[str, lora.Spectrum] = task.cache.get_or_compute(
            "anchors", lora.fingerprint(retained), lambda: make_anchors(retained, device)
        )
        changed = task.state.delta_since_task_start()
        layers = {} if changed is None else changed.layers
        beside = {n: lora.LoraFactors(f.A.to(device), f.B.to(device)) for n, f in layers.items()}

        def price() -> Tensor:
            update = live_update(module, beside)
            return update_penalty(update, anchors, self.method.update)

        return Penalised(losses, price)


def make_deal(method: MethodConfig, adapter: AdapterConfig) -> Deal | RoutedDeal:
    """Return the method of an experiment.

    Raises:
        UserError: unknown retention.
    """
    choose("method.retention.filter", method.retention.filter, {**RETENTIONS, "none": None})
    if method.retention.apart:
        return RoutedDeal(adapter, method, sum_phases(method.prototype, routes=True))
    return Deal(adapter, method, sum_phases(method.prototype))


NEGLIGIBLE = 1e-3
"""Retained directions below this part of a layer's strongest are not protected: relative to
their strength, any change would be immense."""


def make_anchors(retained: lora.Adapter, device: torch.device) -> dict[str, lora.Spectrum]:
    """Return layer name to the directions of what is retained of it, none where nothing is;
    float32, on ``device``: one thin SVD a layer."""
    anchors = {}
    for name, factors in retained.layers.items():
        parts = lora.strong_part(lora.spectrum(factors, retained.scaling), NEGLIGIBLE)
        directions = parts.U, parts.S, parts.Vh
        anchors[name] = lora.Spectrum(*(part.to(device, torch.float32) for part in directions))
    return anchors


def update_penalty(
    updates: Mapping[str, lora.LoraFactors],
    anchors: Mapping[str, lora.Spectrum],
    config: UpdateConfig,
) -> Tensor:
    """Return the mean over layers of :func:`layer_penalty`, a scalar (M15).

    The mean, not the sum: the weights then mean the same for a model of any depth. ``updates`` are
    factors of ``Delta = B A``, scaling included.
    """
    costs = [layer_penalty(update, anchors[name], config) for name, update in updates.items()]
    return torch.stack(costs).mean()


def layer_penalty(update: lora.LoraFactors, anchor: lora.Spectrum, config: UpdateConfig) -> Tensor:
    """Return ``lambda1 sum_k w_k iota_k^2 + lambda2 ||Delta (I - V V^T)||_F^2``, a scalar.

    ``iota_k = (||Delta v_k||^2 + ||u_k^T Delta||^2)^(1/2) / sigma_k`` is the interference (M14)
    with retained direction ``k`` relative to its strength (1: as large as what is retained), ``w_k
    = sigma_k / sum sigma``. Where nothing is retained, the second term is all. Cost ``O((d_out +
    d_in) r (r + k))``; differentiable in both factors, with gradient 0 at ``Delta = 0``.
    """
    along = update.A @ anchor.Vh.T
    entering = (update.B @ along).square().sum(dim=0)
    leaving = (anchor.U.T @ update.B @ update.A).square().sum(dim=1)
    weights = anchor.S / anchor.S.sum()
    interference = (entering + leaving) / anchor.S.square()
    free = update.A - along @ anchor.Vh
    free_size = ((update.B.T @ update.B) * (free @ free.T)).sum().clamp(min=0.0)  # rounding
    return config.lambda1 * (weights * interference).sum() + config.lambda2 * free_size


def live_update(
    module: nn.Module, beside: Mapping[str, lora.LoraFactors]
) -> dict[str, lora.LoraFactors]:
    """Return layer name to factors of what the task changes, scaling included, with gradient."""
    update = {}
    for name, layer in lora_layers(module).items():
        A = layer.lora_A[CURRENT].weight
        B = layer.scaling[CURRENT] * layer.lora_B[CURRENT].weight
        if name in beside:
            A = torch.cat([A, beside[name].A], dim=0)
            B = torch.cat([B, beside[name].B], dim=1)
        update[name] = lora.LoraFactors(A, B)
    return update
