"""Kinds of adapter. A kind is a file and a line here; all are plain LoRA factors in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter
from deal_core.lora.pooled import POOLED, add_pooled_map, begin_pooled

BeginTask = Callable[[Adapter, Tensor, Tensor], Adapter]
"""From a new current adapter, the vectors of the names of the task's labels and those of earlier
tasks, to what the task begins with."""


def add_nothing(base: nn.Module) -> None:
    """Leave the base model as it is."""


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter.

    Attributes:
        add_layers: gives the base model the layers that it lacks.
        target_modules: what is adapted; empty: ``adapter.target_modules``.
        rule: the aggregation rule that it needs; empty: ``aggregation.rule``.
        begin_task: server, at the start of a stage; None: as the method leaves it.
    """

    add_layers: Callable[[nn.Module], None] = add_nothing
    target_modules: tuple[str, ...] = ()
    rule: str = ""
    begin_task: BeginTask | None = None


KINDS: Mapping[str, AdapterKind] = {
    "lora": AdapterKind(),
    "pooled": AdapterKind(add_pooled_map, (POOLED,), "ffa-a", begin_pooled),
}
"""``adapter.kind`` to what it is."""


def kind_of(adapter: AdapterConfig) -> AdapterKind:
    """Return the kind that an experiment names.

    Raises:
        UserError: unknown ``adapter.kind``.
    """
    return choose("adapter.kind", adapter.kind, KINDS)
