"""The global model beyond the frozen base: the adapters whose sum it is (docs/method.md, M1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deal_core.lora.adapter import Adapter, LoraFactors, split, stack


@dataclass(frozen=True, eq=False)
class State:
    """The global model beyond the frozen base. Two states are equal if they are the same object.

    Attributes:
        current: what this task teaches (trained in rounds).
        retained: all earlier tasks (scaling 1); ``base + retained`` is the model as it was at
            the start of the task.
        residual: what this task changes beside ``current`` (scaling 1): what an exact
            aggregation rule found no room for; None where there is none.
        num_reference_directions: so many leading directions of ``retained`` show the model at the
            start of the task, and are no part of the model now: a teacher travels, but only once.
        heads: task to its label head, ``(labels, size + 1)``, float32: a row of weights on the
            unit embedding and a bias for each label; or ``(labels, 2, size + 1)``, the second row
            for telling it from other labels of its task. A task without one is answered by the
            names of its labels.
        sums: what clients' statistics add up to so far, or what else a method keeps at the server,
            float64, by names of the method's own; none of it travels.
    """

    current: Adapter
    retained: Adapter
    residual: Adapter | None = None
    num_reference_directions: int = 0
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> list[Adapter]:
        """Return all adapters of the model now; their sum is the whole update of the base model."""
        kept = (
            split(self.retained, self.num_reference_directions)[1]
            if self.num_reference_directions
            else self.retained
        )
        return [a for a in (kept, self.residual, self.current) if a is not None and a.rank]

    def delta_since_task_start(self) -> Adapter | None:
        """Return what is changed since the start of the task, ``current`` left out (scaling 1)."""
        changes = [] if self.residual is None else [self.residual]
        if self.num_reference_directions:
            gone = split(self.retained, self.num_reference_directions)[0]
            layers = {n: LoraFactors(f.A, -f.B) for n, f in gone.layers.items()}
            changes.append(Adapter(layers, gone.scaling))
        return stack(changes) if changes else None
