"""The contestant ``deal``: what a client does with a task; and the same step made private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.lora.adapter import orthogonal_init, zero_adapter
from deal_core.lora.attach import lora_layers, read, set_trainable, write
from deal_core.lora.learnt import learning_by_key
from deal_core.methods.shared.plain import Plain
from deal_core.models import Encoded, LanguageModel, load_model
from deal_core.privacy.mechanisms.private_gradients import GRID_BITS
from deal_core.randomness import seeded
from deal_core.training.allocator import keep_memory
from deal_core.training.batching import training_batches
from deal_core.training.evaluation import count_correct
from deal_core.training.loop import train
from deal_core.training.per_sample import clipped_gradients
from simulations.bench.measures import Measures
from simulations.bench.workloads import MAX_LENGTH, Turn, Workload, texts

BOTH = frozenset({"lora_A", "lora_B"})
WHOLE = 2**31
"""Tokens in one pass that no batch reaches."""
MAX_GRAD_NORM = NOISE_MULTIPLIER = 1.0
STEP = MAX_GRAD_NORM / 2**GRID_BITS
"""Of the grid that clipped gradients are summed on."""


class DealWork:
    """One model that keeps learning, window after window."""

    def __init__(self, workload: Workload, measures: Measures, private: bool) -> None:
        if measures.allocator:
            keep_memory()
        config = TrainConfig(batch_size=workload.batch_size)
        passes = config.tokens_per_microbatch if measures.passes else WHOLE
        self._config = config.model_copy(update={"tokens_per_microbatch": passes})
        self._model = new_model(getattr(torch, measures.precision))
        if not measures.layers:
            as_loaded(self._model)
        self._private = private
        loaded = texts(workload)
        self._labels = loaded.labels
        self._turn = Turn(workload, [Encoded(*example) for example in loaded.train])
        self._test = [Encoded(*example) for example in loaded.test]

    def window(self) -> Mapping[str, float]:
        """One epoch over the next examples."""
        data = self._turn.next()
        objective = Plain(self._model, self._labels, data)
        generator = seeded(0, "bench", self._turn.number)
        if self._private:
            train_privately(self._model, objective, data, self._config, generator)
        else:
            train(self._model, objective, data, BOTH, 1, self._config, generator)
        return {"work": len(data)}

    def report(self) -> Mapping[str, float]:
        """Accuracy on questions that were not trained on."""
        correct = count_correct(self._model, self._test, self._labels)
        return {"accuracy": correct / len(self._test)}


def new_model(dtype: torch.dtype) -> LanguageModel:
    """The embedded encoder with a fresh adapter."""
    model = load_model(ModelConfig(), AdapterConfig(), MAX_LENGTH, dtype)
    before = read(model.module)
    fresh = orthogonal_init(
        zero_adapter(before.shapes, 1), before.rank, before.scaling, seeded(0, "bench")
    )
    write(model.module, fresh)
    return model


def as_loaded(model: LanguageModel) -> None:
    """Give the model PEFT's own layers and transformers' own attention."""
    for layer in lora_layers(model.module).values():
        del layer.forward
    base: Any = model.module.get_base_model()
    base.set_attn_implementation("sdpa")


def train_privately(
    model: LanguageModel,
    objective: Plain,
    data: Sequence[Encoded],
    config: TrainConfig,
    generator: torch.Generator,
) -> None:
    """The cost of DP-SGD on the same batches: clipped gradients and Gaussian noise. A budget
    needs sampling and accounting too, which cost no time here."""
    parameters = set_trainable(model.module, BOTH)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    for batch in training_batches(data, config.batch_size, generator):
        found = clipped_gradients(model.module, objective, batch, MAX_GRAD_NORM, STEP).total
        for key, parameter in learning_by_key(model.module).items():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            noise *= NOISE_MULTIPLIER * MAX_GRAD_NORM
            parameter.grad = (noise + STEP * found[key]) / len(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def deal_work(workload: Workload, precision: str, private: bool = False) -> DealWork:
    """Set up in a process of its own: the step as it is."""
    return DealWork(workload, Measures(precision, True, True, True), private)


def measured_work(workload: Workload, measures: Measures) -> DealWork:
    """Set up in a process of its own: the step with some of what it has."""
    return DealWork(workload, measures, False)
