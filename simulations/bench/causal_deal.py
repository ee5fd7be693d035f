"""The contestant ``deal`` with a language model: what a client does with a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.lora.adapter import orthogonal_init, zero_adapter
from deal_core.lora.attach import read, write
from deal_core.methods.shared.plain import Plain
from deal_core.models import LanguageModel, load_model
from deal_core.randomness import seeded
from deal_core.training.allocator import keep_memory
from deal_core.training.loop import train
from simulations.bench.prompts import questions
from simulations.bench.step_deal import BOTH
from simulations.bench.workloads import Turn, Workload


class CausalDealWork:
    """One model that keeps learning, window after window."""

    def __init__(
        self, workload: Workload, precision: str, name: str, first_layer: int, shared: bool
    ) -> None:
        keep_memory()
        self._config = TrainConfig(batch_size=workload.batch_size)
        adapter = AdapterConfig(first_layer=first_layer)
        self._model = new_model(name, adapter, workload.tokens, getattr(torch, precision))
        asked = questions(workload.total, workload.tokens, workload.options)
        self._labels = asked.labels
        data = self._model.encode(asked.train, asked.labels)
        if not shared:
            data = [replace(item, shared=0) for item in data]
        self._turn = Turn(workload, data)
        self._held_out = self._model.encode(asked.held_out, asked.labels)

    def window(self) -> Mapping[str, float]:
        """One epoch over the next examples."""
        data = self._turn.next()
        objective = Plain(self._model, self._labels, data)
        generator = seeded(0, "bench", self._turn.number)
        train(self._model, objective, data, BOTH, 1, self._config, generator)
        return {"work": len(data)}

    def report(self) -> Mapping[str, float]:
        """Threads, and the mean loss of an answer that was not trained on."""
        objective = Plain(self._model, self._labels, self._held_out)
        with torch.no_grad():
            loss = objective.example_losses(range(len(self._held_out))).mean()
        return {"threads": torch.get_num_threads(), "loss": float(loss)}


def new_model(
    name: str, adapter: AdapterConfig, max_length: int, dtype: torch.dtype
) -> LanguageModel:
    """Return a causal model with a fresh adapter."""
    config = ModelConfig(family="causal-lm", name=name)
    model = load_model(config, adapter, max_length, dtype)
    before = read(model.module)
    fresh = orthogonal_init(
        zero_adapter(before.shapes, 1), before.rank, before.scaling, seeded(0, "bench")
    )
    write(model.module, fresh)
    return model


def causal_deal_work(
    workload: Workload, precision: str, name: str, first_layer: int = 0, shared: bool = True
) -> CausalDealWork:
    """Set up in a process of its own."""
    return CausalDealWork(workload, precision, name, first_layer, shared)
