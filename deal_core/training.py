"""The one local loop: what a client does with a task, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.attach import merge, write
from deal_core.batching import evaluation_batches, training_batches, within_budget
from deal_core.config import TrainConfig
from deal_core.learner import learner_of
from deal_core.methods import Objective, State
from deal_core.models import Encoded, LanguageModel


@dataclass(frozen=True)
class TrainReport:
    """Attributes: optimiser ``steps`` taken and the mean ``loss`` over them (0 steps: 0)."""

    steps: int
    loss: float


def load_state(model: LanguageModel, state: State) -> None:
    """Put the current adapter into the model, and everything else into its frozen weights."""
    merge(model.module, state.retained, state.residual, state.apart)
    write(model.module, state.current)


def train(
    model: LanguageModel,
    objective: Objective,
    data: Sequence[Encoded],
    trained: frozenset[str],
    epochs: int,
    config: TrainConfig,
    generator: torch.Generator,
) -> TrainReport:
    """Run ``epochs`` of AdamW on the current adapter, in place (or on what the objective makes it
    from).

    Args:
        model: holds the adapters of the round (see :func:`load_state`).
        objective: what is minimised.
        data: the client's tokenised examples; may be empty, then nothing happens.
        trained: which factors learn in this round, of ``{"lora_A", "lora_B"}``.
        epochs: passes over the data.
        config: learning rate, batch size, tokens in one pass.
        generator: orders the examples; the only randomness.
    """
    learner = learner_of(objective, model.module, trained)
    optimizer = torch.optim.AdamW(
        learner.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    losses: list[float] = []
    for _ in range(epochs):
        for batch in training_batches(data, config.batch_size, generator):
            losses.append(accumulate(objective, data, batch, config.tokens_per_pass))
            learner.before_step()
            optimizer.step()
            learner.after_step()
            optimizer.zero_grad(set_to_none=True)
    learner.finish()
    return TrainReport(len(losses), sum(losses) / len(losses) if losses else 0.0)


def accumulate(
    objective: Objective, data: Sequence[Encoded], batch: Sequence[int], tokens: int
) -> float:
    """Add the gradient of one batch, pass by pass; return its loss.

    The sum over passes is the gradient of the mean over the batch: cutting changes memory and
    rounding, not the step.
    """
    total = 0.0
    for part in within_budget(data, batch, tokens):
        loss = objective.example_losses(part).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    penalty = objective.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
        total += float(penalty.detach())
    return total


def count_correct(model: LanguageModel, data: Sequence[Encoded], labels: Sequence[str]) -> int:
    """Return how many examples the model answers rightly, among ``labels``."""
    correct = 0
    for batch in evaluation_batches(data):
        with torch.no_grad():
            answers = model.scores([data[i] for i in batch], labels).argmax(dim=1).cpu()
        correct += int((answers == torch.tensor([data[i].target for i in batch])).sum())
    return correct
