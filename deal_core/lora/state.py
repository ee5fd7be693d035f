"""The global model beyond the frozen base: the adapters whose sum it is (docs/method.md, M1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deal_core.config.experiment import AdapterConfig
from deal_core.lora import adapter as lora
from deal_core.lora import payload


@dataclass(frozen=True)
class Component:
    """Rows of the retained adapter that answer some tasks alone: ``rank`` of them, behind those of
    the components before."""

    tasks: tuple[str, ...]
    rank: int


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
        components: of ``retained``, where what tasks taught is kept apart
            (:mod:`deal_core.deal.routed`); none: its rows are one sum.
        sums: what clients' statistics add up to so far, or what else a method keeps at the server,
            float64, by names of the method's own; none of it travels.
    """

    current: lora.Adapter
    retained: lora.Adapter
    residual: lora.Adapter | None = None
    num_reference_directions: int = 0
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    components: tuple[Component, ...] = ()
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> list[lora.Adapter]:
        """Return all adapters of the model now; their sum is the whole update of the base model."""
        kept = (
            lora.split(self.retained, self.num_reference_directions)[1]
            if self.num_reference_directions
            else self.retained
        )
        return [a for a in (kept, self.residual, self.current) if a is not None and a.rank]

    def place_of(self, task: str) -> int | None:
        """Return the place of the component that answers a task; None: none does."""
        places = [place for place, own in enumerate(self.components) if task in own.tasks]
        return places[0] if places else None

    def view(self, place: int | None) -> State:
        """Return the model with one of the components alone, or, for None, with none, beside what
        is learnt now; without components, the state itself."""
        if not self.components:
            return self
        if place not in self._views:  # one object each: what is merged already is not merged anew
            retained = lora.zero_adapter(self.retained.shapes, 1)
            if place is not None:
                ranks = [each.rank for each in self.components]
                behind = lora.split(self.retained, sum(ranks[:place]))[1]
                retained = lora.split(behind, ranks[place])[0]
            self._views[place] = replace(self, retained=retained, components=())
        return self._views[place]

    @cached_property
    def _views(self) -> dict[int | None, State]:
        return {}

    def delta_since_task_start(self) -> lora.Adapter | None:
        """Return what is changed since the start of the task, ``current`` left out (scaling 1)."""
        changes = [] if self.residual is None else [self.residual]
        if self.num_reference_directions:
            gone = lora.split(self.retained, self.num_reference_directions)[0]
            layers = {n: lora.LoraFactors(f.A, -f.B) for n, f in gone.layers.items()}
            changes.append(lora.Adapter(layers, gone.scaling))
        return lora.stack(changes) if changes else None


def continued(state: State, config: AdapterConfig, generator: torch.Generator) -> State:
    """Return the same state; before the first task one with a drawn adapter, of methods that train
    one for all tasks: nothing is retained."""
    if any(bool(factors.A.any()) for factors in state.current.layers.values()):
        return state
    scaling = config.lora_alpha / config.rank
    current = lora.orthogonal_init(state.retained, config.rank, scaling, generator)
    nothing = lora.zero_adapter(state.retained.shapes, 1)
    return replace(state, current=current, retained=nothing, num_reference_directions=0)


def snapshot_task_start(state: State) -> State:
    """Return (server, at the start of a task) the same model, whose start is ``base + retained``.

    A method that trains one adapter on and on has the start of the task in the current adapter,
    which moves. So the start is copied into the retained adapter for the length of the task, and
    its directions are counted: they are there to be seen, and no part of the model. Every client
    then knows the start, whenever it first takes part, and nothing but adapters travels. The start
    has the very factors of the adapter, which ``ewc`` compares; behind them stands what exact rules
    found no room for in earlier tasks, which *is* part of the model.
    """
    current = state.current
    start = lora.stack([current] if state.residual is None else [current, state.residual])
    return replace(state, retained=start, residual=None, num_reference_directions=current.rank)


def drop_task_start(state: State) -> State:
    """Return (server, at the end of the task) the state before :func:`snapshot_task_start`.

    What exact rules found no room for, in this task and before, is the residual again.
    """
    left = state.parts()[:-1]
    nothing = lora.zero_adapter(state.current.shapes, 1)
    return replace(
        state,
        retained=nothing,
        residual=lora.stack(left) if left else None,
        num_reference_directions=0,
    )


def start_of(state: State) -> State:
    """Return the state at the start of the task, at any time during it."""
    held, scaling = (
        lora.split(state.retained, state.num_reference_directions)[0],
        state.current.scaling,
    )
    layers = {n: lora.LoraFactors(f.A, f.B / scaling) for n, f in held.layers.items()}
    return replace(state, current=lora.Adapter(layers, scaling), residual=None)


def by_key(adapter: lora.Adapter) -> dict[str, Tensor]:
    """Return key to factor, in the order of the layers; the scaling is left out."""
    tensors = {}
    for name, factors in adapter.layers.items():
        tensors[f"{payload.PREFIX}{name}.lora_A.weight"] = factors.A
        tensors[f"{payload.PREFIX}{name}.lora_B.weight"] = factors.B
    return tensors


def with_factors(like: lora.Adapter, tensors: Mapping[str, Tensor]) -> lora.Adapter:
    """Return the adapter ``like`` with the factors in ``tensors``, by key, in place of its own."""
    layers = {
        name: lora.LoraFactors(
            tensors.get(f"{payload.PREFIX}{name}.lora_A.weight", own.A),
            tensors.get(f"{payload.PREFIX}{name}.lora_B.weight", own.B),
        )
        for name, own in like.layers.items()
    }
    return lora.Adapter(layers, like.scaling)


def changed(adapter: lora.Adapter, change: Mapping[str, Tensor]) -> lora.Adapter:
    """Return the adapter after a change of some factors, by key; float32."""
    before = by_key(adapter)
    after = {key: (before[key].double() + own.double()).float() for key, own in change.items()}
    return with_factors(adapter, after)


def learnt_shapes(adapter: lora.Adapter, trained: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """Return key to shape of what learns."""
    return {
        k: tuple(t.shape) for k, t in by_key(adapter).items() if payload.factor_of(k) in trained
    }


def to_arrays(adapter: lora.Adapter) -> payload.Arrays:
    """Return key to factor as float32 arrays."""
    return {key: factor.detach().cpu().numpy() for key, factor in by_key(adapter).items()}


def from_arrays(
    arrays: Mapping[str, NDArray[np.generic]], shapes: lora.Shapes, rank: int, scaling: float
) -> lora.Adapter:
    """Return the adapter of arrays by key, every one checked.

    Raises:
        PayloadError: a key too many or too few, a wrong dtype or shape, a value that is
            not finite.
    """
    like = lora.zero_adapter(shapes, rank, scaling)
    expected = {k: payload.Header("float32", tuple(each.shape)) for k, each in by_key(like).items()}
    payload.check_headers(arrays, expected)
    for key in expected:
        if not np.isfinite(arrays[key]).all():
            raise payload.PayloadError(f"{key}: a value is not finite")
    tensors = {key: torch.from_numpy(np.array(arrays[key], np.float32)) for key in expected}
    return with_factors(like, tensors)
