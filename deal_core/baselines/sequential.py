"""Baselines that train adapters on task after task: ``sequential`` alone, the lower one; ``lwf``,
which distils its own past; ``olora`` and ``slao``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig, DistillationConfig
from deal_core.deal.distillation import distilled
from deal_core.deal.interface import LocalTask, Phase
from deal_core.deal.objective import Penalised, plain
from deal_core.lora import adapter as lora
from deal_core.lora.attach import CURRENT, lora_layers
from deal_core.lora.state import State, continued, drop_task_start, snapshot_task_start
from deal_core.training.loop import Objective


@dataclass(frozen=True)
class Sequential:
    """FedAvg of LoRA over a stream: nothing is retained. Attributes: ``adapter`` (ranks, alpha)."""

    adapter: AdapterConfig

    @property
    def phases(self) -> Sequence[Phase]:
        """None: rounds of learning alone."""
        return ()

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Keep the adapter; make it before the first task."""
        return continued(state, self.adapter, generator)

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Keep everything as it is."""
        return state

    def objective(self, task: LocalTask) -> Objective:
        """Cross-entropy."""
        return plain(task)


@dataclass(frozen=True)
class HeldStart(Sequential):
    """The same, and the model at the start of the task is held for its length."""

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Keep the adapter, and its start."""
        return snapshot_task_start(continued(state, self.adapter, generator))

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Keep the adapter, and its start no longer."""
        return drop_task_start(state)


@dataclass(frozen=True)
class Lwf(HeldStart):
    """Learning without forgetting: the outputs for earlier tasks, on the current task's inputs, are
    distilled from the model as it was at the start of the task. With weight 0 it is ``sequential``.
    Source: docs/method.md (M16) without labels of future tasks; Li & Hoiem, ECCV 2016, arXiv
    1606.09282.

    Attributes:
        distillation: weight.
    """

    distillation: DistillationConfig

    def objective(self, task: LocalTask) -> Objective:
        """Return ``CE + weight * KL(model at the start of the task || model)`` over earlier
        labels."""
        return distilled(task, self.distillation, 0.0, False)


@dataclass(frozen=True)
class OLora(Sequential):
    """An adapter per task, kept out of the row spaces of all earlier ones.

    Those of earlier tasks are frozen, and their sum is the model at the start of the task. A
    penalty, ``weight * ||A_earlier A^T||_F^2`` summed over layers, pulls the new ``A`` to rows that
    are orthogonal to every earlier ``A``. Source: docs/method.md (M21); Wang et al., Findings of
    EMNLP 2023, arXiv 2310.14152. The overlap is squared; the authors' code sums absolute values,
    whose gradient does not vanish with the overlap: under Adam it shakes rows that are orthogonal
    already.

    As in the paper, all adapters are kept as they were learnt, stacked in the retained one, so the
    model grows by ``adapter.rank`` a task. ``adapter.retained_rank`` counts for nothing. Other than
    in the paper, a new ``A`` starts orthogonal to the earlier ones instead of at random.
    """

    weight: float = 0.5

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Start a fresh current adapter outside the row space of the earlier ones."""
        scaling = self.adapter.lora_alpha / self.adapter.rank
        current = lora.orthogonal_init(state.retained, self.adapter.rank, scaling, generator)
        return State(current, state.retained)

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Return the same model: the task's adapter stands frozen beside the earlier ones, stacked
        in the retained one, and the current one is zero."""
        current = state.current
        nothing = lora.zero_adapter(current.shapes, current.rank, current.scaling)
        return State(nothing, in_use(lora.stack(state.parts())))

    def objective(self, task: LocalTask) -> Objective:
        """Return ``CE + weight * ||A_earlier A^T||_F^2``."""
        model, retained = task.model, task.state.retained
        earlier = {n: f.A.to(model.device) for n, f in retained.layers.items()}
        return Penalised(plain(task), lambda: overlap(model.module, earlier, self.weight))


def in_use(adapter: lora.Adapter) -> lora.Adapter:
    """Leave out directions that change nothing: ``B`` zero in every layer; keep one at least."""
    used = torch.stack([f.B.any(dim=0) for f in adapter.layers.values()]).any(dim=0)
    used[0] |= not used.any()
    layers = {n: lora.LoraFactors(f.A[used], f.B[:, used]) for n, f in adapter.layers.items()}
    return lora.Adapter(layers, adapter.scaling)


def overlap(module: nn.Module, earlier: dict[str, Tensor], weight: float) -> Tensor | None:
    """Return ``weight * sum_layers ||A_earlier A^T||_F^2``; None in a round that leaves A alone.
    ``earlier``: layer name to the rows of all earlier ``A``, ``(rank so far, d_in)``."""
    current = {n: layer.lora_A[CURRENT].weight for n, layer in lora_layers(module).items()}
    if not any(A.requires_grad for A in current.values()):
        return None
    return (
        weight * torch.stack([(earlier[n] @ A.T).square().sum() for n, A in current.items()]).sum()
    )


TASKS = "tasks"
"""How many have ended; among what stays at the server."""
FINE_TUNED, MERGED = "fine-tuned", "merged"
"""The second ``B`` of each layer, ``NAME/LAYER``: between tasks that of the last task's end, during
a task the merged one."""


@dataclass(frozen=True)
class Slao(Sequential):
    """One adapter, merged with its own past at the end of every task.

    A task goes on from the factors that the last one was fine-tuned to, not from the merged ones:
    ``B`` as it was, ``A`` as the orthonormal basis of its rows. At its end the answer is given by
    the new ``A`` and by a ``B`` between what was merged so far and the new one, with weight
    ``1 / sqrt(t)`` in the ``t``-th task. Nothing is added to the loss. Source: docs/method.md
    (M46), (M47); Qiao & Mahdavi, ICLR 2026, arXiv 2512.23017.

    As in the paper, the first task is plain LoRA, and a task begins with another model than the
    last one ended with. Checked against reviews and another implementation of the paper, not
    against its authors' code: the sign of each row is that of the old one (the diagonal of ``R`` is
    positive), and ``A`` is scaled no further, so its rows have length 1 from the second task on.

    In the federation the last average of the clients' factors is what the task was fine-tuned to.
    The server alone needs the second ``B``, and keeps it: nothing more travels than for
    ``sequential``. Factors of two tasks are added entry by entry, so the rule must keep their
    coordinates. Where clients have their own orders a stage counts as a task.
    """

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Return a state that goes on from the last task's own factors, (M46), and keeps the merged
        ``B`` aside; before the first task one with a drawn adapter."""
        if TASKS not in state.sums:
            return continued(state, self.adapter, generator)
        kept, layers = {TASKS: state.sums[TASKS]}, {}
        for name, factors in state.current.layers.items():
            kept[f"{MERGED}/{name}"] = factors.B.double()
            last = state.sums[f"{FINE_TUNED}/{name}"].float()
            layers[name] = lora.LoraFactors(orthonormal_rows(factors.A), last)
        return replace(state, current=lora.Adapter(layers, state.current.scaling), sums=kept)

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Return a state that answers with the merged factors, (M47), and keeps the task's own
        ``B`` aside."""
        number = state.sums.get(TASKS, torch.zeros(1, dtype=torch.float64)) + 1
        share = 1.0 / math.sqrt(float(number))
        kept, layers = {TASKS: number}, {}
        for name, factors in state.current.layers.items():
            own = factors.B.double()
            merged = state.sums.get(f"{MERGED}/{name}", torch.zeros_like(own))
            kept[f"{FINE_TUNED}/{name}"] = own
            layers[name] = lora.LoraFactors(factors.A, (merged + share * (own - merged)).float())
        return replace(state, current=lora.Adapter(layers, state.current.scaling), sums=kept)


def orthonormal_rows(A: Tensor) -> Tensor:
    """Return ``Q^T`` of ``A^T = Q R`` with a positive diagonal of ``R``, ``(r, d_in)``: orthonormal
    rows that span those of ``A``, each on the side of the old one; float32."""
    q, r = torch.linalg.qr(A.double().T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.float().contiguous()
