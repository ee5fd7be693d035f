"""The one local loop: what a client minimises, how its gradient comes about, and the steps that it
takes. Under the gradients a privacy mechanism puts its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from deal_core.config.experiment import TrainConfig
from deal_core.lora.attach import merge, set_trainable, write
from deal_core.lora.per_example import ExampleLosses
from deal_core.lora.state import State
from deal_core.models import Encoded, LanguageModel
from deal_core.privacy.interface import Gradients, Probes
from deal_core.training.batching import training_batches, within_budget

TOKENS = 2048
"""Padding included, in one pass of a training batch: bounds memory, not the step."""


class Parametrization:
    """What the optimiser moves in one local training, and what follows it: the factors themselves,
    unless a subclass makes them from parameters of its own.

    All that data says reaches such parameters through the factors' gradients, so whatever is done
    to those (clipping, noise) is done before.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters

    def before_step(self) -> None:
        """The factors' gradients are complete; make them the parameters'."""

    def after_step(self) -> None:
        """The parameters have moved; let the factors follow."""

    def finish(self) -> None:
        """The last step is done."""


class Objective(Protocol):
    """What one client minimises in one round."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates; their mean over the batch is minimised."""

    def penalty(self) -> Tensor | None:
        """Return a term that reads none of the task's data, added once a step; None: there is
        none."""
        return None


def parametrization_of(
    objective: Objective, module: nn.Module, trained: frozenset[str]
) -> Parametrization:
    """Return what an objective wants moved; exactly the ``trained`` factors get a gradient."""
    factors = set_trainable(module, trained)
    own: Callable[[nn.Module, frozenset[str]], Parametrization] | None
    own = getattr(objective, "parametrization", None)
    return Parametrization(factors) if own is None else own(module, trained)


@dataclass(frozen=True)
class NonPrivateGradients:
    """Every example once an epoch, in batches of similar length, in an order that the generator
    draws; no batch where there is no data."""

    data: Sequence[Encoded]
    epochs: int
    config: TrainConfig
    generator: torch.Generator

    def batches(self) -> Iterator[list[int]]:
        """Yield ``epochs`` passes over the data."""
        for _ in range(self.epochs):
            yield from training_batches(self.data, self.config.batch_size, self.generator)

    def rehearse(self, module: nn.Module, objective: ExampleLosses, probes: int) -> None:
        """Do nothing: without a promise there is nothing to try out."""

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """As :func:`mean_gradient`."""
        return mean_gradient(objective, self.data, batch, TOKENS)

    def stepped(self, module: nn.Module) -> None:
        """Do nothing."""

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """Do nothing."""


def mean_gradient(
    objective: ExampleLosses, data: Sequence[Encoded], batch: Sequence[int], tokens: int
) -> float:
    """Return the batch's mean loss, after its gradient was added pass by pass.

    The sum over passes is the gradient of the mean over the batch: cutting changes memory and
    rounding, not the step.
    """
    total = 0.0
    for part in within_budget(data, batch, tokens):
        loss = objective.example_losses(part).sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


@dataclass(frozen=True)
class TrainReport:
    """Attributes: optimiser ``steps`` taken and the mean ``loss`` over them (0 steps: 0)."""

    steps: int
    loss: float


def load_state(model: LanguageModel, state: State) -> None:
    """Put the current adapter into the model, and everything else into its frozen weights; of a
    state with components none: :meth:`State.view` chooses one."""
    state = state.view(None)
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
    """Return the report of ``epochs`` of :func:`run_local_steps` on ordinary gradients, in an order
    that the generator draws. Without data nothing happens."""
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

    The model holds the adapters of the round (see :func:`load_state`), of whose factors those
    ``trained`` learn. A penalty, which reads no data, comes after what the gradients' source has
    done to those of the data. Source: docs/method.md (M5).
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
