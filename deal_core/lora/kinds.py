"""Kinds of adapter; all are plain LoRA factors in the end.

``pooled`` is LoRA on an identity map behind an encoder's pooling of token states. The frozen map
``I`` (d x d) takes a text's pooled unit vector ``e``; its update is ``s * lora_B @ lora_A``.
``lora_B`` is public and frozen for a task: an orthonormal basis of the task's centred label
vectors, outside of those of earlier tasks. So what a task learns moves scores along its own labels
alone, the mean of ``lora_A`` over clients is exact, and few numbers learn. Source: docs/method.md
(M56), (M57).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deal_core.config.experiment import AdapterConfig, AggregationConfig
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter, LoraFactors, outside

POOLED = "pooled"
"""Name of the map among the layers of a model."""
NEGLIGIBLE = 1e-6
"""Singular values of centred unit vectors below this are rounding."""
BeginTask = Callable[[Adapter, Tensor, Tensor], Adapter]
"""From a new current adapter, and the unit vectors of the names of the task's labels and of all
earlier ones, ``(labels, d)``, to what the task begins with."""


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter.

    Attributes:
        add_layers: gives the base model the layers that it lacks; nothing where it lacks none.
        target_modules: what is adapted; empty: ``adapter.target_modules``.
        rule: the aggregation rule that it needs; empty: ``aggregation.rule``.
        begin_task: server, at the start of a stage; None: as the method leaves it.
        map_behind: the map behind an encoder's pooling that it is in the end, ``(d, d)``; None: it
            is LoRA on the base model's own layers, which PEFT alone loads.
    """

    add_layers: Callable[[nn.Module], None] = lambda base: None
    target_modules: tuple[str, ...] = ()
    rule: str = ""
    begin_task: BeginTask | None = None
    map_behind: Callable[[Adapter], Tensor] | None = None


def add_pooled_map(base: nn.Module) -> None:
    """Give the base model the frozen identity, in float32, that the adapter changes."""
    first = next(base.parameters())
    size: int = getattr(base, "config").hidden_size  # noqa: B009 - not every module has one
    identity = nn.Linear(size, size, bias=False, device=first.device, dtype=torch.float32)
    if first.device.type != "meta":
        nn.init.eye_(identity.weight)
    base.add_module(POOLED, identity.requires_grad_(False))


def begin_pooled(current: Adapter, labels: Tensor, earlier: Tensor) -> Adapter:
    """Return the adapter that a task begins with: ``lora_A`` zero, ``lora_B`` the label basis.

    Its rank ``k`` is the number of directions, so that nothing else is learnt, sent or hidden by
    noise. Whoever is sent an adapter scales it by ``lora_alpha / k``; ``lora_B`` is ``k / rank``
    long, so that what is learnt counts as much for every task. ``current`` has the largest rank and
    the scaling that belongs to it.
    """
    basis = label_basis(labels, earlier, current.rank)
    size, share = basis.shape[1], basis.shape[1] / current.rank
    layers = {
        name: LoraFactors(factors.A.new_zeros(size, factors.A.shape[1]), share * basis)
        for name, factors in current.layers.items()
    }
    return Adapter(layers, current.scaling / share)


def map_behind(adapter: Adapter) -> Tensor:
    """Return the map that takes a text's pooled unit vector ``e`` to ``W e``, ``(d, d)``, float32:
    the identity and its update by all tasks (M57)."""
    factors = adapter.layers[POOLED]
    update = adapter.scaling * factors.B.double() @ factors.A.double()
    return (torch.eye(len(update), dtype=torch.float64) + update).float()


def label_basis(labels: Tensor, earlier: Tensor, rank: int) -> Tensor:
    """Return at most ``rank`` orthonormal columns, ``(d, k)``, float32: (M56); one column of zeros
    where the labels, ``(labels, d)``, have no direction beside the ``earlier`` ones."""
    centred = _centred(labels)
    if len(earlier):
        centred = outside(centred, _strongest_first(_centred(earlier)))
    own = _strongest_first(centred)[:rank]
    return own.T.float() if len(own) else torch.zeros(labels.shape[1], 1)


def _centred(labels: Tensor) -> Tensor:
    return labels.double() - labels.double().mean(dim=0)


def _strongest_first(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows, the strongest first; the sign of each is fixed by
    its largest entry."""
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = vh[s > NEGLIGIBLE]
    peak = kept.abs().argmax(dim=1, keepdim=True)
    return kept * torch.where(kept.gather(1, peak) < 0, -1.0, 1.0)


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
