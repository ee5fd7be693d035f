"""Consolidation: clients distil all that was learnt into the retained adapter.

Source: docs/method.md, section 2.3: (M8), (M9), (M19). After the rounds of learning the server
stacks everything learnt so far. The stack is the teacher, ``base + retained``, and stands apart;
its filtered best part of rank ``retained_rank`` is the student, the current adapter of these
rounds, with scaling ``lora_alpha / retained_rank`` like any current adapter. Clients lower
``KL(teacher || student)`` over the labels of all tasks so far, and the server aggregates the
student's factors as it aggregates any others: by the same rule (what that trains, is trained here
too; what it finds no room for stands beside the student, and the best part of both is kept at the
end), behind the same robust steps, guard and wire format. Clients of their own ranks train the
whole student.

The stack travels down once, whole, and the student up: at most ``2 retained_rank + rank`` rows a
layer down where learning has ``retained_rank + rank``.

**Privacy.** On private texts the student's update is a release like that of any round of learning:
under differential privacy it must be clipped, noised and charged. In ``should_run``, ``setup`` and
``consolidated`` no private data is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import (
    compress,
    fingerprint,
    relative_difference,
    rescaled,
    stack,
    zero_adapter,
)
from deal_core.lora.state import State
from deal_core.methods.auto_settings import consolidates
from deal_core.methods.deal.filter_learning import diagonal_student, make_filter_learning
from deal_core.methods.deal.retention import retain
from deal_core.methods.interface import LocalTask, Phase
from deal_core.models import Encoded, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.distillation import distillation_losses, joint_labels
from deal_core.training.objective import Objective
from deal_core.training.teacher import Teacher, make_teacher

CONSOLIDATE = "consolidate"
LEARNED = "learned"
NEGLIGIBLE = 1e-5
"""A student that differs less from its teacher, by norm, differs by rounding."""


@dataclass(frozen=True)
class Consolidation:
    """Attributes: ``adapter`` (ranks, alpha) and ``method`` (filter, consolidation)."""

    adapter: AdapterConfig
    method: MethodConfig

    def setup(self, state: State) -> State:
        """Server: the student as current adapter, the teacher apart."""
        everything = stack(state.parts())
        rank = self.adapter.retained_rank
        scaling = self.adapter.lora_alpha / rank
        if self.method.retention.filter == LEARNED:
            student = diagonal_student(everything, rank, scaling, self.method.retention)
        else:
            student = rescaled(retain(everything, rank, self.method.retention), scaling)
        return replace(
            state,
            current=student,
            retained=everything,
            residual=None,
            num_reference_directions=everything.rank,
        )

    def should_run(self, state: State) -> bool:
        """Server: whether the student differs from its teacher at all."""
        return relative_difference(stack(state.parts()), state.retained) > NEGLIGIBLE

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Return ``KL(teacher || student)`` over the labels of all tasks so far (M19)."""
        config = self.method.consolidation
        everything = (joint_labels((*task.seen, task.labels)),)
        teacher: Teacher = cache.get_or_compute(
            "teacher",
            f"{fingerprint(state.retained)} {everything} {len(data)}",
            lambda: make_teacher(model, data, task.labels, everything, task.protected),
        )
        taught = Taught(model, task.labels, everything, data, teacher, config.temperature)
        if self.method.retention.filter != LEARNED:
            return taught
        return make_filter_learning(taught, model, state, self.method)


@dataclass(frozen=True)
class Taught:
    """What a teacher says of every example, and nothing else.

    Attributes:
        labels: those that ``data`` is encoded with.
        everything: labels of all tasks so far, as one space.
    """

    model: LanguageModel
    labels: Sequence[str]
    everything: Sequence[Sequence[str]]
    data: Sequence[Encoded]
    teacher: Teacher
    temperature: float

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return ``T^2 KL(teacher || student)``, ``(batch,)``."""
        items = [self.data[i] for i in batch]
        learnt = self.model.forward_train(items, self.labels, self.everything)
        teacher_logits = torch.cat(self.teacher(batch))
        return distillation_losses(learnt, teacher_logits, self.temperature)

    def penalty(self) -> None:
        """Return None: there is no term beside the data."""


def consolidated(state: State, adapter: AdapterConfig) -> State:
    """Server, after the last round: the student is what is retained."""
    nothing = zero_adapter(state.current.shapes, adapter.rank, adapter.lora_alpha / adapter.rank)
    retained = compress(stack(state.parts()), adapter.retained_rank)
    return replace(
        state, current=nothing, retained=retained, residual=None, num_reference_directions=0
    )


def consolidation_phases(adapter: AdapterConfig, method: MethodConfig) -> tuple[Phase, ...]:
    """Return the phase, where the experiment wants it.

    Learned gains scale columns of ``lora_B`` and leave ``lora_A`` alone, so that its mean is
    exact whatever the rule of the rounds of learning: these rounds aggregate as ``ffa``.
    """
    config = method.consolidation
    if not consolidates(method):
        return ()
    stage = Consolidation(adapter, method)
    return (
        Phase(
            name=CONSOLIDATE,
            rounds=config.rounds,
            objective=stage.objective,
            setup=stage.setup,
            should_run=stage.should_run,
            learning_rate=config.learning_rate,
            rule="ffa" if method.retention.filter == LEARNED else "",
        ),
    )
