"""Baseline ``deal-reference``: DEAL as its authors' second code release reads the paper.

From the second task on, both factors of every layer are replaced for good by what a gate on their
spectrum and an MLP make of them (:mod:`~deal_core.methods.deal_reference.factor_map`). The factors
as the task began are fixed; gates and MLPs alone learn. Their loss is

    ``CE + lambda1 sum |theta_1|^a + lambda2 sum |theta_2|^b``,

``theta_1`` all that the gates learn (centres, logarithms of squared widths, gains), ``theta_2``
all that the MLPs learn: sums, not means, towards 0. The first task is plain LoRA. Sources: DEAL,
arXiv 2509.18942, eq. 8 to 12 and algorithm 1; what the paper leaves open is that release's: 4
kernels, one layer, ReLU on the spectrum, MLPs on the columns with ``max(128, min(n, 512))`` hidden
units, Kaiming weights and zero biases drawn anew in every task, ``a = 5``, ``b = 2``.

It has to be read as it is: a drawn MLP is no identity, so a task begins with a model that has lost
what it knew, and the gates pass weak directions better than strong ones. ``deal`` is the method
made well-posed.

Other than there, because it is federated:

* Only factors travel. The server makes the factors that a task begins with, from MLPs that are
  drawn from ``method.deal_reference.seed``, the same in every task; clients draw the same ones.
* Averaged factors are the factors of no gate and MLP. A client goes on with its own, which it
  keeps on its disk, and holds the difference fixed in a round: ``received + map(now) - map(as the
  round began)``. With one client there is no difference. What a client keeps does not grow with
  the tasks; it is many times the size of an adapter.
* The factors of a task's end are the last average, not a map's.
* Steps, learning rate and batches are the experiment's, as for every method; the optimiser's
  moments begin anew in every round. (There: 1e-5, one epoch.)

Other than there, with no effect but on cost and rounding: float32, and one SVD a task instead of
one in every pass. Where nothing was learnt in any task before, a task is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import DealReferenceConfig, MethodConfig
from deal_core.lora.adapter import Adapter, fingerprint, is_nonzero
from deal_core.lora.state import State
from deal_core.methods.deal_reference.factor_map import FactorMap, fresh_map
from deal_core.methods.deal_reference.mapped import Mapped, carried_maps
from deal_core.methods.interface import LocalTask, Phase
from deal_core.methods.shared.continued import continued
from deal_core.methods.shared.named_factors import named, unnamed
from deal_core.methods.shared.plain import plain
from deal_core.methods.shared.task_start import drop_task_start, snapshot_task_start, start_of
from deal_core.models import Encoded, LanguageModel
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective

CPU = torch.device("cpu")


@dataclass(frozen=True)
class DealReference:
    """Attributes: ``adapter`` (ranks, alpha), and the kernels, penalties and draw of ``config``."""

    adapter: AdapterConfig
    config: DealReferenceConfig
    phases: tuple[Phase, ...] = ()

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Hold the factors as they are; the current ones are what fresh maps make of them."""
        held = snapshot_task_start(continued(state, self.adapter, generator))
        if not is_nonzero(held.current):
            return held
        made = {k: m.factor() for k, m in fresh_maps(held.current, self.config).items()}
        return replace(held, current=unnamed(made, held.current))

    def end_task(self, state: State) -> State:
        """Keep the adapter, and its start no longer."""
        return drop_task_start(state)

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``CE + lambda1 sum |theta_1|^a + lambda2 sum |theta_2|^b``; plain in the first
        task."""
        losses = plain(model, task, data)
        start = start_of(state).current
        if not is_nonzero(start):
            return losses
        fresh = fresh_maps(start, self.config)
        basis = fingerprint(state.retained)
        maps = carried_maps(fresh, task.round_state, basis, model.device)
        return Mapped(losses, maps, self._price, task.round_state, basis)

    def _price(self, maps: Sequence[FactorMap]) -> Tensor:
        return penalty(maps, self.config)


def fresh_maps(start: Adapter, config: DealReferenceConfig) -> Mapping[str, FactorMap]:
    """Return the map of each factor as a task begins, by the factor's key
    (:mod:`~deal_core.methods.shared.named_factors`); on the CPU, so that server and clients make
    the same."""
    return {
        key: fresh_map(factor, config.kernels, seeded("factor map", config.seed, key))
        for key, factor in named(start, CPU).items()
    }


def penalty(maps: Sequence[FactorMap], config: DealReferenceConfig) -> Tensor:
    """Return ``lambda1 sum |theta_1|^a + lambda2 sum |theta_2|^b`` over all maps, all entries."""
    retaining = [t.abs().pow(config.a).sum() for m in maps for t in m.retaining()]
    updating = [t.abs().pow(config.b).sum() for m in maps for t in m.updating()]
    first, second = torch.stack(retaining).sum(), torch.stack(updating).sum()
    return config.lambda1 * first + config.lambda2 * second


def make_deal_reference(method: MethodConfig, adapter: AdapterConfig) -> DealReference:
    """Build from the experiment."""
    return DealReference(adapter, method.deal_reference)
