"""Kinds of adapter. A kind is a file and a line here; all are plain LoRA factors in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig, AggregationConfig
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter
from deal_core.lora.pooled import POOLED, add_pooled_map, begin_pooled, map_behind

BeginTask = Callable[[Adapter, Tensor, Tensor], Adapter]
"""From a new current adapter, and the unit vectors of the names of the task's labels and of all
earlier ones, ``(labels, d)``, to what the task begins with."""


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
        map_behind: the map behind an encoder's pooling that it is in the end, ``(d, d)``; None: it
            is LoRA on the base model's own layers, which PEFT alone loads.
    """

    add_layers: Callable[[nn.Module], None] = add_nothing
    target_modules: tuple[str, ...] = ()
    rule: str = ""
    begin_task: BeginTask | None = None
    map_behind: Callable[[Adapter], Tensor] | None = None


KINDS: Mapping[str, AdapterKind] = {
    "lora": AdapterKind(),
    "pooled": AdapterKind(add_pooled_map, (POOLED,), "ffa-a", begin_pooled, map_behind=map_behind),
}
"""``adapter.kind`` to what it is."""


def rule_of(adapter: AdapterConfig, aggregation: AggregationConfig) -> str:
    """Return the name of the rule by which what is learnt is aggregated: the kind's own, or the
    experiment's."""
    return kind_of(adapter).rule or aggregation.rule


def kind_of(adapter: AdapterConfig) -> AdapterKind:
    """Return the kind that an experiment names.

    Raises:
        UserError: unknown ``adapter.kind``.
    """
    return choose("adapter.kind", adapter.kind, KINDS)
