"""The seam of a continual-learning method: what the server keeps, what a client minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deal_core.lora.state import State
from deal_core.models import Encoded, LanguageModel
from deal_core.training.cache import Cache
from deal_core.training.objective import Objective
from deal_core.wire.instruction import LEARN
from deal_core.wire.sum_codes import ROUNDED_AT

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
    """What a client still has of the tasks that it worked on itself before the one at hand.

    Attributes:
        shares: one per such task, in the client's order; read when called.
        kept: what it keeps beside its data.
        known: so many of them, the first ones, the model at the start of the stage has learnt; the
            client ended the others within the stage.
    """

    shares: Sequence[Callable[[], TaskDataset]]
    kept: TaskMemory
    known: int


class RoundState(Protocol):
    """What a client carries from round to round of a task, on its own disk; it never leaves."""

    def load(self, basis: str) -> Tensors:
        """Return what its latest round before this one left, for an equal ``basis``; empty if
        nothing."""

    def save(self, basis: str, tensors: Tensors) -> None:
        """Leave this for a later round of the task."""


@dataclass(frozen=True)
class TaskPrompt:
    """How a model that answers in words is asked about a task: public, as its labels are.

    Attributes:
        labels: answers among which is chosen.
        instruction: what the prompt asks for; empty: ``model.instruction``.
    """

    labels: Sequence[str]
    instruction: str = ""


@dataclass(frozen=True)
class LocalTask:
    """What a client knows of the task at hand.

    Attributes:
        labels: the task's public label space.
        seen: label spaces of the other tasks that some client had met before the stage (in phases
            after learning, those of the stage as well), in the stream's order.
        future: label spaces of the stream's tasks that no client works on before the stage has
            ended; read when called.
        prompts: of the tasks of ``seen``, in their order.
        instruction: what the prompt of the task asks for; empty: ``model.instruction``.
        protected: single records are: nothing discrete may be decided about several together.
        past: what the client has of its own earlier tasks; None in its first.
        round_state: what it has of earlier rounds; None where nothing can be kept.
        joint_tasks: where several tasks are learnt at once, the client's share of each, in the
            order of its data; ``labels`` are then those of the first. Empty: there is one task.
    """

    labels: Sequence[str]
    seen: Sequence[Sequence[str]]
    past: TaskHistory | None = None
    round_state: RoundState | None = None
    joint_tasks: Sequence[TaskDataset] = ()
    future: Callable[[], Sequence[Sequence[str]]] = tuple
    prompts: Sequence[TaskPrompt] = ()
    protected: bool = False
    instruction: str = ""


MakeObjective = Callable[
    [LanguageModel, State, LocalTask, Sequence[Encoded], Cache],
    Objective,
]


@dataclass(frozen=True)
class EmbeddedTask:
    """A client's records of a task as its statistics see them.

    Attributes:
        embeddings: unit vectors of the frozen base model, ``(examples, size)``, float32.
        targets: labels, ``(examples,)``.
        labels: how many there are.
        head: the task's; None where it has none yet.
    """

    embeddings: Tensor
    targets: Tensor
    labels: int
    head: Tensor | None = None


@dataclass(frozen=True)
class SumsOnWire:
    """How the sums of a task travel.

    Attributes:
        shapes: as those of :class:`Statistics`, of what travels.
        codes: name of what travels to its form, one of ``deal_core.wire.sum_codes.SUM_CODES``;
            others are exact.
        pack: client: its sums -> what travels, before it is rounded.
        check: server: what travelled; :class:`~deal_core.lora.payload.PayloadError` for what no
            data can give.
        unpack: server: what travelled -> the sums.
    """

    shapes: Callable[[int, int], Mapping[str, tuple[int, ...]]]
    codes: Mapping[str, str]
    pack: Callable[[Tensors], Tensors]
    check: Callable[[Tensors], None]
    unpack: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class SumNoise:
    """What is known of sums that hide every record.

    Attributes:
        deviation: standard deviation of the noise in each entry of a sum of embeddings, in units of
            the embeddings.
        names: task to the frozen vectors of its label names, ``(labels, size)``, public.
    """

    deviation: float
    names: Mapping[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """What a phase adds up over clients instead of training, and how labels are answered from then
    on: sums are exact however the data are divided, and what the frozen base model makes of a text
    never changes. All tensors are float64, of one task.

    Attributes:
        shapes: numbers of labels and of entries of an embedding -> name to shape of what a client
            gives; a name has a reason to leave in ``client.egress``.
        collect: client: its records of a task -> their sums.
        check: server: the sums of one client; :class:`~deal_core.lora.payload.PayloadError` for
            what no data can give.
        absorb: server: the state, and task to the sums over clients -> the state after the round.
        once: each client gives its sums of a task once in a run, in its first round on it;
            otherwise in every round.
        layers: of how many of the base model's last layers embeddings are made.
        names: what scores of label names by the adapted model weigh beside those of heads; 0:
            heads answer alone.
        head_rows: rows that a label has in its task's head, 1 or 2; see
            :mod:`deal_core.training.head_scores`.
        rounded: how sums travel at ``wire.dtype = "int8"``, and heads by rows with them; None: all
            is exact all the same.
        absorb_noised: server: as ``absorb``, of class sums with noise (``count`` and ``sum`` alone,
            neither whole nor positive); None: nothing can be made of them.
    """

    shapes: Callable[[int, int], Mapping[str, tuple[int, ...]]]
    collect: Callable[[EmbeddedTask], Tensors]
    check: Callable[[Tensors], None]
    absorb: Callable[[State, Mapping[str, Tensors]], State]
    once: bool
    layers: int = 1
    names: float = 0.0
    head_rows: int = 1
    rounded: SumsOnWire | None = None
    absorb_noised: Callable[[State, Mapping[str, Tensors], SumNoise], State] | None = None

    def head_shape(self, labels: int, size: int) -> tuple[int, ...]:
        """Return the shape of a task's head: of each label its rows of weights and a bias."""
        rows = () if self.head_rows == 1 else (self.head_rows,)
        return (labels, *rows, size + 1)

    def rounds(self, dtype: str) -> bool:
        """Whether sums, and heads, are rounded at ``wire.dtype``."""
        return self.at(dtype) is self.rounded

    def at(self, dtype: str) -> SumsOnWire:
        """Return how sums travel at ``wire.dtype``."""
        if self.rounded is not None and dtype == ROUNDED_AT:
            return self.rounded
        return SumsOnWire(self.shapes, {}, lambda sums: sums, self.check, lambda sums: sums)


@dataclass(frozen=True)
class Phase:
    """Rounds of a task in which clients minimise one objective over what the server lays out, or
    add up statistics.

    Attributes:
        name: in instructions and events.
        rounds: per task.
        objective: client, once a round: as :meth:`Method.objective`.
        setup: server, before the first round; the adapter that is trained is ``current``.
        should_run: server, before every round: False leaves it out.
        learning_rate: 0: ``train.learning_rate``.
        rule: aggregation rule; empty: ``aggregation.rule``.
        public_path: a file of unlabelled texts that takes the place of the client's own data;
            empty: its own data of the task.
        statistics: what is added up; then nothing is trained. None: the objective is minimised.
    """

    name: str
    rounds: int
    objective: MakeObjective
    setup: Callable[[State], State]
    should_run: Callable[[State], bool]
    learning_rate: float = 0.0
    rule: str = ""
    public_path: str = ""
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        """Check that sums are of the client's own records, which its policy counts.

        Raises:
            ValueError: they are of public texts.
        """
        if self.public_path and self.statistics is not None:
            raise ValueError("a phase of statistics reads the client's own data")


def phases_of(method: Method, rounds: int = 0) -> dict[str, Phase]:
    """Return all phases of a task by name, in order: ``rounds`` of learning, then the method's
    own. One that a method calls ``learn`` takes the place of ordinary learning, with its rounds."""
    learn = Phase(LEARN, rounds, method.objective, lambda state: state, lambda state: True)
    return {phase.name: phase for phase in (learn, *method.phases)}


def phases_after(method: Method, joint_tasks: bool) -> list[Phase]:
    """Return the phases that follow the rounds of learning. Before all tasks at once there is
    nothing that could be consolidated with them: then those of statistics alone."""
    phases = [phase for phase in method.phases if phase.name != LEARN]
    return [phase for phase in phases if phase.statistics is not None or not joint_tasks]


def statistics_of(method: Method) -> Statistics | None:
    """Return what clients add up over their records; None: nothing. Several phases of a method have
    embeddings and answers in common."""
    return next((each.statistics for each in method.phases if each.statistics is not None), None)


class Method(Protocol):
    """A method reads no data on the server, and sends nothing but adapters, or the sums that it
    declares, from a client."""

    @property
    def phases(self) -> Sequence[Phase]:
        """What follows the rounds of learning in every task, in order; and what takes their place,
        where one is called ``learn``."""

    def begin_task(self, state: State, generator: torch.Generator) -> State:
        """Server, before the first round of a stage (which is a task where all clients work on
        the same one)."""

    def end_task(self, state: State) -> State:
        """Server, after the last round of a stage, that of its last phase."""

    def objective(
        self,
        model: LanguageModel,
        state: State,
        task: LocalTask,
        data: Sequence[Encoded],
        cache: Cache,
    ) -> Objective:
        """Client, once a round: ``model`` holds ``state`` already."""
