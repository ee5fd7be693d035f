"""The one local loop: what a client does with a task, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deal_core.config.experiment import TrainConfig
from deal_core.lora.attach import merge, write
from deal_core.lora.state import State
from deal_core.models import Encoded, LanguageModel
from deal_core.training.gradients import Gradients
from deal_core.training.nonprivate_gradients import NonPrivateGradients
from deal_core.training.objective import Objective
from deal_core.training.parametrization import parametrization_of


@dataclass(frozen=True)
class TrainReport:
    """Attributes: optimiser ``steps`` taken and the mean ``loss`` over them (0 steps: 0)."""

    steps: int
    loss: float


def load_state(model: LanguageModel, state: State) -> None:
    """Put the current adapter into the model, and everything else into its frozen weights."""
    merge(model.module, state.retained, state.residual, state.num_reference_directions)
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
    """Return the report of ``epochs`` of AdamW on ordinary gradients: :func:`run_local_steps`.

    Args:
        model: holds the adapters of the round (see :func:`load_state`).
        objective: what is minimised.
        data: the client's tokenised examples; may be empty, then nothing happens.
        trained: which factors learn in this round, of ``{"lora_A", "lora_B"}``.
        epochs: passes over the data.
        config: learning rate, batch size, tokens in one pass.
        generator: orders the examples; the only randomness.
    """
    gradients = NonPrivateGradients(data, epochs, config, generator)
    return run_local_steps(model, objective, gradients, trained, config)


def run_local_steps(
    model: LanguageModel,
    objective: Objective,
    gradients: Gradients,
    trained: frozenset[str],
    config: TrainConfig,
) -> TrainReport:
    """Return the report of AdamW on the current adapter, in place (or on what it is made from).

    What reads no data, penalty and weight decay, comes after what the gradients' source has done
    to those of the data. Source: docs/method.md (M5).

    Args:
        model: holds the adapters of the round (see :func:`load_state`).
        objective: what is minimised.
        gradients: batches, and the gradient of each.
        trained: which factors learn in this round, of ``{"lora_A", "lora_B"}``.
        config: learning rate.
    """
    parametrization = parametrization_of(objective, model.module, trained)
    optimizer = torch.optim.AdamW(
        parametrization.parameters,
        lr=config.learning_rate,
        weight_decay=0.0,
        fused=True,
    )
    losses: list[float] = []
    for batch in gradients.batches():
        loss = gradients.accumulate(model.module, objective, batch)
        losses.append(loss + penalise(objective))
        parametrization.before_step()
        optimizer.step()
        parametrization.after_step()
        optimizer.zero_grad(set_to_none=True)
        gradients.stepped(model.module)
    parametrization.finish()
    return TrainReport(len(losses), sum(losses) / len(losses) if losses else 0.0)


def penalise(objective: Objective) -> float:
    """Add the gradient of the objective's penalty; return the penalty."""
    penalty = objective.penalty()
    if penalty is None:
        return 0.0
    penalty.backward()  # type: ignore[no-untyped-call]
    return float(penalty.detach())
