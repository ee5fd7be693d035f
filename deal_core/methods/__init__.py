"""Continual-learning methods; a method is a file and a line in ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deal_core.config.experiment import AdapterConfig, Experiment
from deal_core.config.method import MethodConfig
from deal_core.errors import choose
from deal_core.methods.auto_settings import (
    FEWEST_IN_SUM,
    resolve_auto,
    texts_at_once,
)
from deal_core.methods.deal.method import make_deal
from deal_core.methods.deal_reference.method import make_deal_reference
from deal_core.methods.ewc import make_ewc
from deal_core.methods.interface import (
    EmbeddedTask,
    LocalTask,
    Method,
    Phase,
    RoundState,
    Statistics,
    SumContext,
    TaskDataset,
    TaskHistory,
    TaskMemory,
    TaskPrompt,
    Tensors,
    phases_after,
    phases_of,
    statistics_of,
    sums_beside_learning,
)
from deal_core.methods.linear_probe import make_linear_probe
from deal_core.methods.lwf import make_lwf
from deal_core.methods.olora import make_olora
from deal_core.methods.prototype import make_prototype
from deal_core.methods.replay import make_replay
from deal_core.methods.sequential import make_sequential
from deal_core.methods.shared.mixed import under_all_labels
from deal_core.methods.shared.prototypes import COUNT, SUM, whole_heads
from deal_core.methods.slao import make_slao

METHODS: Mapping[str, Callable[[MethodConfig, AdapterConfig], Method]] = {
    "deal": make_deal,
    "deal-reference": make_deal_reference,
    "ewc": make_ewc,
    "linear-probe": make_linear_probe,
    "lwf": make_lwf,
    "olora": make_olora,
    "prototype": make_prototype,
    "replay": make_replay,
    "sequential": make_sequential,
    "slao": make_slao,
}


RULES: Mapping[str, frozenset[str]] = {
    "ewc": frozenset({"fedit", "ffa"}),
    "deal-reference": frozenset({"fedit"}),
    "slao": frozenset({"fedit", "ffa"}),
}
"""Aggregation rules that a method can work with, where it cannot with all: ewc compares factors
entry by entry and slao adds those of two tasks, and other rules change their coordinates;
deal-reference replaces both factors of a layer, so both must learn in every round, in their own
coordinates."""

KEEP_TEXTS = frozenset({"replay"})
"""Methods whose clients keep texts of earlier tasks, and train on them again: a reference."""


def make_method(method: MethodConfig, adapter: AdapterConfig) -> Method:
    """Return the method that the experiment names.

    Raises:
        UserError: unknown ``method.name``.
    """
    return choose("method.name", method.name, METHODS)(method, adapter)


def method_of(experiment: Experiment) -> Method:
    """Return the method of an experiment.

    Raises:
        UserError: unknown ``method.name``, or settings that do not go together.
    """
    return make_method(resolve_auto(experiment), experiment.adapter)


__all__ = [
    "COUNT",
    "FEWEST_IN_SUM",
    "KEEP_TEXTS",
    "METHODS",
    "RULES",
    "SUM",
    "EmbeddedTask",
    "LocalTask",
    "Method",
    "Phase",
    "RoundState",
    "Statistics",
    "SumContext",
    "TaskDataset",
    "TaskHistory",
    "TaskMemory",
    "TaskPrompt",
    "Tensors",
    "make_method",
    "method_of",
    "phases_after",
    "phases_of",
    "resolve_auto",
    "statistics_of",
    "sums_beside_learning",
    "texts_at_once",
    "under_all_labels",
    "whole_heads",
]
