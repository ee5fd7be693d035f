"""Kinds of adapter. A kind is a file and a line here; all are plain LoRA factors in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig, AggregationConfig
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter
from deal_core.lora.core import begin_core
from deal_core.lora.pooled import POOLED, add_pooled_map, begin_pooled, map_behind


@dataclass(frozen=True)
class PublicTask:
    """What everybody may know of a task that begins; each part is made when it is asked for.

    Attributes:
        labels: unit vectors of the names of its labels, ``(labels, d)``.
        earlier: those of all earlier tasks.
        gradients: layer name to the gradient of its weight on the names of the labels as texts.
        retained: all that was learnt before.
    """

    labels: Callable[[], Tensor]
    earlier: Callable[[], Tensor]
    gradients: Callable[[], Mapping[str, Tensor]]
    retained: Adapter


BeginTask = Callable[[Adapter, PublicTask], Adapter]
"""From a new current adapter to what a task begins with."""


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
        core: whether a core between frozen factors learns (:mod:`deal_core.lora.core`).
        map_behind: the map behind an encoder's pooling that it is in the end, ``(d, d)``; None: it
            is LoRA on the base model's own layers, which PEFT alone loads.
    """

    add_layers: Callable[[nn.Module], None] = add_nothing
    target_modules: tuple[str, ...] = ()
    rule: str = ""
    begin_task: BeginTask | None = None
    core: bool = False
    map_behind: Callable[[Adapter], Tensor] | None = None


def _begin_pooled(current: Adapter, task: PublicTask) -> Adapter:
    return begin_pooled(current, task.labels(), task.earlier())


def _begin_core(current: Adapter, task: PublicTask) -> Adapter:
    return begin_core(current, task.gradients(), task.retained)


KINDS: Mapping[str, AdapterKind] = {
    "lora": AdapterKind(),
    "pooled": AdapterKind(add_pooled_map, (POOLED,), "ffa-a", _begin_pooled, map_behind=map_behind),
    "core": AdapterKind(rule="ffa", begin_task=_begin_core, core=True),
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
