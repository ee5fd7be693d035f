"""Baseline ``slao``: one adapter, merged with its own past at the end of every task.

A task goes on from the factors that the last one was fine-tuned to, not from the merged ones: ``B``
as it was, ``A`` as the orthonormal basis of its rows. At its end the answer is given by the new
``A`` and by a ``B`` between what was merged so far and the new one, with weight ``1 / sqrt(t)`` in
the ``t``-th task. Nothing is added to the loss. Source: docs/method.md (M46), (M47); Qiao &
Mahdavi, ICLR 2026, arXiv 2512.23017.

As in the paper, the first task is plain LoRA, and a task begins with another model than the last
one ended with. Checked against reviews and another implementation of the paper, not against its
authors' code: the sign of each row is that of the old one (the diagonal of ``R`` is positive), and
``A`` is scaled no further, so its rows have length 1 from the second task on.

In the federation. The rule averages the clients' factors in every round; the last average is what
the task was fine-tuned to. The server alone needs the second ``B``, and keeps it: nothing more
travels than for ``sequential``. Factors of two tasks are added entry by entry, so the rule must
keep their coordinates: ``fedit``, ``ffa``. Where clients have their own orders a
stage counts as a task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.baselines.sequential import Sequential
from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.state import State, continued

TASKS = "tasks"
"""How many have ended; among what stays at the server."""
FINE_TUNED, MERGED = "fine-tuned", "merged"
"""The second ``B`` of each layer, ``NAME/LAYER``: between tasks that of the last task's end, during
a task the merged one."""


@dataclass(frozen=True)
class Slao(Sequential):
    """Cross-entropy alone; what differs is where a task begins, and what is answered after it."""

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Return a state that goes on from the last task's own factors, (M46), and keeps the merged
        ``B`` aside; before the first task one with a drawn adapter."""
        if TASKS not in state.sums:
            return continued(state, self.adapter, generator)
        kept, layers = {TASKS: state.sums[TASKS]}, {}
        for name, factors in state.current.layers.items():
            kept[f"{MERGED}/{name}"] = factors.B.double()
            last = state.sums[f"{FINE_TUNED}/{name}"].float()
            layers[name] = LoraFactors(orthonormal_rows(factors.A), last)
        return replace(state, current=Adapter(layers, state.current.scaling), sums=kept)

    def end_task(self, state: State) -> State:
        """Return a state that answers with the merged factors, (M47), and keeps the task's own
        ``B`` aside."""
        tasks = state.sums.get(TASKS, torch.zeros(1, dtype=torch.float64)) + 1
        share = 1.0 / math.sqrt(float(tasks))
        kept, layers = {TASKS: tasks}, {}
        for name, factors in state.current.layers.items():
            own = factors.B.double()
            merged = state.sums.get(f"{MERGED}/{name}", torch.zeros_like(own))
            kept[f"{FINE_TUNED}/{name}"] = own
            layers[name] = LoraFactors(factors.A, (merged + share * (own - merged)).float())
        return replace(state, current=Adapter(layers, state.current.scaling), sums=kept)


def orthonormal_rows(A: Tensor) -> Tensor:
    """Return ``Q^T`` of ``A^T = Q R`` with a positive diagonal of ``R``, ``(r, d_in)``: orthonormal
    rows that span those of ``A``, each on the side of the old one; float32."""
    q, r = torch.linalg.qr(A.double().T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.float().contiguous()


def make_slao(method: MethodConfig, adapter: AdapterConfig) -> Slao:
    """Build from the experiment; ``method`` has no key for it."""
    return Slao(adapter)
