"""The seam of a continual-learning method: what the server keeps, what a client minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deal_core.config.data import DataConfig
from deal_core.config.experiment import ModelConfig
from deal_core.data import public_texts
from deal_core.data.embedded import cache_folder
from deal_core.lora.state import State
from deal_core.models import embedding_size
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.training.loop import Cache, Objective
from deal_core.training.public_subspace import Subspace, public_subspace
from deal_core.wire.instruction import LEARN
from deal_core.wire.secure_layout import CLASS_SUMS
from deal_core.wire.tensors import ROUNDED_AT

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TaskDataset:
    """A client's own training data of one task, and the task's public label space."""

    labels: Sequence[str]
    data: Sequence[Encoded]


class TaskMemory(Protocol):
    """What a client keeps from task to task, on its own disk; it never leaves."""

    def get_or_compute(
        self, tasks: int, basis: str, make: Callable[[int, Tensors], Tensors]
    ) -> Tensors:
        """Return what is kept of the client's first ``tasks`` tasks and ``basis`` (equal when all
        it depends on is).

        At first it is made, ``make(before, tensors)``, from what was kept of the largest number
        ``before`` that is smaller; from ``(0, {})`` where nothing was.
        """


@dataclass(frozen=True)
class TaskHistory:
    """What a client still has of the tasks that it worked on itself before the one at hand."""

    shares: Sequence[Callable[[], TaskDataset]]
    """Of each, in the client's order; read when called."""
    kept: TaskMemory
    """Beside its data."""
    known: int
    """So many, the first ones, the model at the start of the stage has learnt; the client ended the
    others within the stage."""


class RoundState(Protocol):
    """What a client carries from round to round of a task, on its own disk; it never leaves."""

    def load(self, basis: str) -> Tensors:
        """Return what its latest round before this one left, for an equal ``basis``; empty if
        nothing."""

    def save(self, basis: str, tensors: Tensors) -> None:
        """Leave this for a later round of the task."""


@dataclass(frozen=True)
class TaskPrompt:
    """How a model that answers in words is asked about a task: public, as its labels are. An empty
    ``instruction``: the usual one."""

    labels: Sequence[str]
    instruction: str = ""


@dataclass(frozen=True)
class LocalTask:
    """The task at hand in one round of a client: what it computes with, and what it knows."""

    model: LanguageModel
    """Holds ``state`` already."""
    state: State
    data: Sequence[Encoded]
    """The client's own training examples."""
    labels: Sequence[str]
    """Its public label space."""
    seen: Sequence[Sequence[str]]
    """Label spaces of the other tasks that some client had met before the stage (in phases after
    learning, those of the stage as well), in the stream's order."""
    past: TaskHistory | None = None
    """None in the client's first task."""
    round_state: RoundState | None = None
    """None where nothing can be kept."""
    joint_tasks: Sequence[TaskDataset] = ()
    """Where several tasks are learnt at once, the client's share of each, in the order of its data;
    ``labels`` are then those of the first. Empty: there is one task."""
    future: Callable[[], Sequence[Sequence[str]]] = tuple
    """Label spaces of tasks that no client works on within the stage; read when called."""
    prompts: Sequence[TaskPrompt] = ()
    """Of the tasks of ``seen``, in their order."""
    protected: bool = False
    """Single records are: nothing discrete may be decided about several together."""
    instruction: str = ""
    """What the prompt of the task asks for; empty: the usual."""
    cache: Cache = field(default_factory=Cache)
    """What follows from the data and is kept from round to round."""


def no_objective(task: LocalTask) -> Objective:
    """The objective of a phase in which nothing is trained."""
    raise NotImplementedError("nothing is trained in a phase of statistics")


@dataclass(frozen=True)
class EmbeddedTask:
    """A client's records of a task as its statistics see them."""

    embeddings: Tensor
    """Of the frozen base model, ``(examples, size)``, float32: unit vectors, or coordinates."""
    targets: Tensor
    """``(examples,)``."""
    labels: int
    """How many there are."""
    head: Tensor | None = None
    """The task's; None where it has none yet."""


@dataclass(frozen=True)
class SumContext:
    """What the server knows, without any record, of the class sums that it gets."""

    deviation: float
    """Standard deviation of the noise in each entry, in lengths of a vector."""
    names: Mapping[str, Tensor]
    """Task to the vectors of its label names, ``(labels, size)``; of all tasks so far."""
    subspace: Subspace | None
    """The public directions in which records were added up; None: of no class sums."""


@dataclass(frozen=True)
class ExactSums:
    """Sums of which every digit is needed: in simulations alone. All tensors are float64."""

    shapes: Callable[[int, int], Mapping[str, tuple[int, ...]]]
    """Numbers of labels and of entries of a vector -> name to shape of what is given."""
    collect: Callable[[EmbeddedTask], Tensors]
    """Client: its records of a task -> their sums."""
    check: Callable[[Tensors], None]
    """Server: the sums over clients; PayloadError for what no data can give."""


@dataclass(frozen=True)
class Statistics:
    """What a phase adds up over clients instead of training, under masks, and how labels are
    answered from then on: what the frozen base model makes of a text never changes.

    Attributes:
        absorb: server: the state, task to the sums over clients, and what is known of them -> the
            state after the round. Class sums are ``count`` and ``sum``.
        once: sums of a task are taken once in a run; otherwise in every round.
        layers: of how many of the base model's last layers embeddings are made.
        directions: public directions in which records are added up
            (:mod:`deal_core.training.public_subspace`); 0: all of an embedding.
        noise_multiplier: noise of class sums where no mechanism says how much, in largest parts of
            a record.
        names: whether scores of label names by the adapted model count beside those of heads.
        routes: whether they choose among components: texts are embedded without their prompts, and
            a task that writes has one class, all of its texts.
        exact: sums of another kind; None: class sums.
    """

    absorb: Callable[[State, Mapping[str, Tensors], SumContext], State]
    once: bool
    layers: int = 1
    directions: int = 0
    noise_multiplier: float = 0.0
    names: bool = False
    routes: bool = False
    exact: ExactSums | None = None

    def rounds(self, dtype: str) -> bool:
        """Whether heads are rounded at ``wire.dtype``: those of class means."""
        return self.exact is None and dtype == ROUNDED_AT

    def names_weight(self, has_label_logits: bool) -> float:
        """Return what scores of label names weigh: 0.5 of encoders, 1 of the likelihood of words;
        0: heads answer alone."""
        return (0.5 if has_label_logits else 1.0) * self.names

    def classes(self, labels: Sequence[str]) -> int:
        """Return of how many classes of a task sums are taken."""
        return len(labels) or int(self.routes)

    def size(self, model: ModelConfig) -> int:
        """Return the entries of a vector that is added up; no weights are read."""
        size = embedding_size(model, self.layers)
        return min(self.directions or size, size)

    def shapes(self, classes: int, model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
        """Return name to shape of what a client gives of a task with so many classes."""
        if self.exact is not None:
            return self.exact.shapes(classes, self.size(model))
        return {CLASS_SUMS: (classes, self.size(model) + 1)}

    def subspace(
        self, data: DataConfig, model: LanguageModel, spaces: Sequence[Sequence[str]]
    ) -> Subspace:
        """Return the public directions in which records are added up; ``spaces``: the label spaces
        of all tasks, of texts that are answers none.

        Raises:
            UserError: as :func:`~deal_core.data.public_texts`.
        """
        texts = public_texts(data, spaces)
        first = () if self.routes else next(space for space in spaces if space)
        folder = cache_folder("public")
        return public_subspace(model, texts, self.layers, self.directions, first, folder)


@dataclass(frozen=True)
class Phase:
    """Rounds of a task in which clients minimise one objective, or add up statistics."""

    name: str
    rounds: int
    """Per task."""
    objective: Callable[[LocalTask], Objective] = no_objective
    """Client, once a round: as :meth:`Method.objective`."""
    statistics: Statistics | None = None
    """What is added up; then nothing is trained. None: the objective is minimised."""


def phases_of(method: Method, rounds: int = 0) -> dict[str, Phase]:
    """Return all phases of a task by name, in order: ``rounds`` of learning, then the method's
    own. One that a method calls ``learn`` takes the place of ordinary learning, with its rounds."""
    learn = Phase(LEARN, rounds, method.objective)
    return {phase.name: phase for phase in (learn, *method.phases)}


def phases_after(method: Method) -> list[Phase]:
    """Return the phases that follow the rounds of learning: of statistics."""
    return [phase for phase in method.phases if phase.name != LEARN]


def statistics_of(method: Method) -> Statistics | None:
    """Return what clients add up over their records; None: nothing. Several phases of a method have
    embeddings and answers in common."""
    return next((each.statistics for each in method.phases if each.statistics is not None), None)


def sums_beside_learning(method: Method) -> bool:
    """Return whether class sums are taken in a phase of their own, after what is learnt."""
    return any(
        each.statistics is not None and each.statistics.exact is None
        for each in method.phases
        if each.name != LEARN
    )


class Method(Protocol):
    """A method reads no data on the server, and sends nothing but adapters, or the sums that it
    declares, from a client."""

    @property
    def phases(self) -> Sequence[Phase]:
        """Rounds of sums that follow those of learning in every task, in order; and what takes
        their place, where one is called ``learn``."""

    def begin_task(
        self, state: State, generator: torch.Generator, tasks: Sequence[str] = ()
    ) -> State:
        """Server, before the first round of a stage (which is a task where all clients work on
        the same one); ``tasks``: those of the stage."""

    def end_task(self, state: State, tasks: Sequence[str] = ()) -> State:
        """Server, after the last round of a stage, that of its last phase."""

    def objective(self, task: LocalTask) -> Objective:
        """Client, once a round."""
