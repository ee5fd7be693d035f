"""The one local loop: what a client minimises, how its gradient comes about, and the steps that it
takes. Under the gradients a privacy mechanism puts its own.

Batches are lists of positions in the data, of similar length: less padding, same examples. Where
single records are protected each has a gradient of its own, and failures are isolated, so that they
cannot affect others.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from deal_core.config.experiment import TrainConfig
from deal_core.lora.attach import ExampleLosses, merge, set_trainable, write
from deal_core.lora.state import State
from deal_core.models.interface import Encoded, LanguageModel

TOKENS = 2048
"""Padding included, in one pass of a training batch: bounds memory, not the step."""
WINDOW = 32
"""Batches that are sorted by length together: wide enough to save padding, narrow enough
to keep batches random."""
EVALUATION_TOKENS = 4096
"""Without gradients no activations are kept, so a pass may be larger."""
EVALUATION_WASTE = 512
"""Padding in one pass that costs as much as another pass would (measured)."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Gradients(Protocol):
    """How the steps of one local training get the gradient of the data."""

    def batches(self) -> Iterable[Sequence[int]]:
        """Return batches of positions in the data, one for each step."""

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the batch's gradient to the factors', without the objective's penalty; return the
        mean loss of the batch, 0 where it must not be known."""

    def stepped(self, module: nn.Module) -> None:
        """The optimiser has moved what it moves.

        Raises:
            UnsafeModel: something that would fail silently has failed.
        """


class Parametrization(Protocol):
    """What the optimiser moves in the place of the factors, which are made of it: an objective with
    a method ``parametrization(module, trained)`` has one.

    All that data says reaches such parameters through the factors' gradients, so whatever is done
    to those (clipping, noise) is done before.
    """

    parameters: Sequence[Tensor]

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

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """As :func:`mean_gradient`."""
        return mean_gradient(objective, self.data, batch, TOKENS)

    def stepped(self, module: nn.Module) -> None:
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
    factors = set_trainable(model.module, trained)
    make = getattr(objective, "parametrization", None)
    moved: Parametrization | None = None if make is None else make(model.module, trained)
    parameters = factors if moved is None else moved.parameters
    rate, losses = config.learning_rate, list[float]()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    for batch in gradients.batches():
        loss, penalty = gradients.accumulate(model.module, objective, batch), objective.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
            loss += float(penalty.detach())
        losses.append(loss)
        if moved is not None:
            moved.before_step()
        optimizer.step()
        if moved is not None:
            moved.after_step()
        optimizer.zero_grad(set_to_none=True)
        gradients.stepped(model.module)
    if moved is not None:
        moved.finish()
    return TrainReport(len(losses), sum(losses) / len(losses) if losses else 0.0)


def training_batches(
    data: Sequence[Encoded], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Return one epoch: every example once, shuffled, in batches of similar length; the last of a
    window may have fewer than ``batch_size``."""
    order = torch.randperm(len(data), generator=generator).tolist()
    together = WINDOW * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), together):
        part = sorted(order[start : start + together], key=lambda i: len(data[i].tokens))
        batches.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def evaluation_batches(data: Sequence[Encoded], alone: bool = False) -> list[list[int]]:
    """Return every example once, sorted by length, in passes of equal cost; ``alone``: each in a
    pass of its own, so that not even rounding, which others in a pass change, depends on others."""
    if alone:
        return [[position] for position in range(len(data))]
    ordered = sorted(range(len(data)), key=lambda i: len(data[i].tokens))
    return within_budget(data, ordered, EVALUATION_TOKENS, EVALUATION_WASTE)


def within_budget(
    data: Sequence[Encoded], batch: Sequence[int], tokens: int, waste: int | None = None
) -> list[list[int]]:
    """Return the passes of a batch of positions in the data, at least one each, in the order given:
    of so many ``tokens`` at most, padding included, and so many tokens of padding (``waste``)."""
    passes: list[list[int]] = []
    longest = real = 0
    for position in batch:
        length = len(data[position].tokens)
        longest, real = max(longest, length), real + length
        taken = (len(passes[-1]) + 1) * longest if passes else real
        if passes and taken <= tokens and (waste is None or taken - real <= waste):
            passes[-1].append(position)
        else:
            passes.append([position])
            longest = real = length
    return passes


def contained(work: Callable[[], Result], alone: bool) -> Result | None:
    """Return what the work gives.

    Where it is about one protected record ``alone``, a failure is None: the caller goes on as if
    the record were not there, so that the failure changes nothing about the others. The site's own
    log has it; nobody else learns that it occurred.

    Raises:
        Exception: that of the work, where it is about several records.
    """
    if not alone:
        return work()
    try:
        return work()
    except Exception:
        log.exception("a record cannot be computed with; it has no part in what is released")
        return None


class Cache:
    """In this process only: a restarted one computes it again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def get_or_compute(self, name: str, basis: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave for this ``basis`` (equal when all it depends on is); what
        it gave for the basis before is forgotten."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != basis:
            kept = self._kept[name] = (basis, make())
        return kept[1]
