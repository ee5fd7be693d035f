"""The one local loop: what a client does with a task, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from deal_core.attach import CURRENT, RESIDUAL, RETAINED, activate, set_trainable, write
from deal_core.batching import evaluation_batches, training_batches
from deal_core.config import TrainConfig
from deal_core.methods import LocalTask, Method, State
from deal_core.models import Encoded, LanguageModel

EVALUATION_FACTOR = 4
"""Evaluation keeps no activations, so its batches can be larger than the training ones."""


@dataclass(frozen=True)
class TrainReport:
    """Attributes: optimiser ``steps`` taken and the mean ``loss`` over them (0 steps: 0)."""

    steps: int
    loss: float


def load_state(model: LanguageModel, state: State) -> None:
    """Put the adapters into the model; those that hold nothing stay out of its way."""
    active = [CURRENT]
    write(model.module, CURRENT, state.current)
    for name, adapter in ((RETAINED, state.retained), (RESIDUAL, state.residual)):
        if adapter is not None and any(bool(f.B.any()) for f in adapter.layers.values()):
            write(model.module, name, adapter)
            active.append(name)
    activate(model.module, active)


def train(
    model: LanguageModel,
    method: Method,
    task: LocalTask,
    data: Sequence[Encoded],
    trained: frozenset[str],
    epochs: int,
    config: TrainConfig,
    generator: torch.Generator,
) -> TrainReport:
    """Run ``epochs`` of AdamW on the current adapter, in place.

    Args:
        model: holds the adapters of the round (see :func:`load_state`).
        method: gives the loss of a batch.
        task: the labels at hand.
        data: the client's tokenised examples; may be empty, then nothing happens.
        trained: which factors learn in this round, of ``{"lora_A", "lora_B"}``.
        epochs: passes over the data.
        config: learning rate, batch size, precision.
        generator: orders the examples; the only randomness.
    """
    parameters = set_trainable(model.module, trained)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    losses: list[torch.Tensor] = []
    for _ in range(epochs):
        for batch in training_batches(data, config.batch_size, generator):
            with precision(model, config):
                loss = method.loss(model, batch, task)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    return TrainReport(len(losses), float(torch.stack(losses).mean()) if losses else 0.0)


def count_correct(
    model: LanguageModel, data: Sequence[Encoded], labels: Sequence[str], config: TrainConfig
) -> int:
    """Return how many examples the model answers rightly, among ``labels``."""
    correct = 0
    for batch in evaluation_batches(data, EVALUATION_FACTOR * config.batch_size):
        with torch.no_grad(), precision(model, config):
            answers = model.scores(batch, labels).argmax(dim=1).cpu()
        correct += int((answers == torch.tensor([item.target for item in batch])).sum())
    return correct


def precision(model: LanguageModel, config: TrainConfig) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where asked, or where ``auto`` finds a GPU that has it."""
    kind = model.device.type
    wanted = config.precision == "bfloat16" or (
        config.precision == "auto" and kind == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(kind, torch.bfloat16) if wanted else nullcontext()
