"""The seam of a privacy mechanism: what a client does under it, and what leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deal_core.lora.per_example import ExampleLosses
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import Policy
from deal_core.privacy.policy import Refusal as Refusal

log = logging.getLogger(__name__)


Counts = Mapping[str, Sequence[float]]
"""``correct``, ``examples`` and, where the model scores all labels at once, ``correct_all``: an
entry a task each (:mod:`deal_core.wire.records`)."""


@dataclass(frozen=True)
class LocalUpdate:
    """What one local training made.

    Attributes:
        arrays: the update as it travels.
        figures: what goes with it: ``num_examples`` (weight in the average) and more.
    """

    arrays: Mapping[str, NDArray[Any]]
    figures: Mapping[str, float]

    def with_figures(self, figures: Mapping[str, float]) -> LocalUpdate:
        """Return the same arrays with other figures."""
        return LocalUpdate(self.arrays, figures)


FAILED = "failed"
"""Name of the one array of what is charged where a training has failed on noise alone as well."""


class RehearsalFailed(RuntimeError):
    """What is tried out on constant texts, before any record is read, does not work."""


class TrainingFailed(RuntimeError):
    """A private training has failed, and so has one on noise alone."""


@contextmanager
def rehearsing() -> Iterator[None]:
    """What is done inside has nothing to do with records: where it fails, nothing is charged.

    Raises:
        RehearsalFailed: it has failed.
    """
    try:
        yield
    except Exception as error:
        raise RehearsalFailed(str(error)) from error


@dataclass(frozen=True)
class Site:
    """What a mechanism needs of a site.

    Attributes:
        ledger: opened when it is first needed.
        policy: None: the site has none, and does what the experiment asks.
        simulated: whether this is a simulated client, whose noise may be seeded.
        run: whose releases these are: one run, as asked for, whatever the site has decided and
            however often it is resumed; empty: the settings alone say it.
    """

    ledger: Callable[[], Ledger]
    policy: Policy | None
    simulated: bool
    run: str = ""


class RecordId(NamedTuple):
    """Which record an example is: the task whose data it was read from, and its row there."""

    task: str
    row: int


Probes = Sequence[Encoded]
"""Constant texts, tokenised: what is found on them tells nothing of any record."""


class Gradients(Protocol):
    """How the steps of one local training get the gradient of the data.

    Attributes:
        data: the examples that may be read; nothing else of the client's is.
    """

    @property
    def data(self) -> Sequence[Encoded]:
        """The examples that may be read."""

    def batches(self) -> Iterable[Sequence[int]]:
        """Return batches of positions in the client's data, one for each step."""

    def rehearse(self, module: nn.Module, objective: ExampleLosses, probes: int) -> None:
        """Take the gradient of an objective over so many constant texts, and drop it: a model that
        cannot be trained privately fails here, before any record is read.

        Raises:
            UnsafeModel, ValueError: it cannot.
        """

    def accumulate(
        self, module: nn.Module, objective: ExampleLosses, batch: Sequence[int]
    ) -> float:
        """Add the batch's gradient to the factors', without the objective's penalty.

        Returns:
            The mean loss of the batch; 0 where it must not be known.
        """

    def stepped(self, module: nn.Module) -> None:
        """The optimiser has moved what it moves.

        Raises:
            RuntimeError: something that would fail silently has failed.
        """

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """The last step is done.

        Args:
            model: holds the adapter as it will be released.
            labels: of the task.
            probes: constant texts on which the model may be looked at.

        Raises:
            RuntimeError: as :meth:`stepped`.
        """


@dataclass(frozen=True)
class Grouping:
    """Which of a client's records are of one group, where groups are protected. Groups are numbers
    that mean nothing elsewhere; they never leave the client.

    Attributes:
        numbers: group of every example of the request, from 0; as long as its data.
        groups: task to the number of the client's groups, all tasks of the run.
        site_groups: the same over all its tasks, whatever the run asks for; a group of several
            tasks counts in each.
    """

    numbers: Sequence[int]
    groups: Callable[[], Mapping[str, int]]
    site_groups: Callable[[], int]


class SumRequest(Protocol):
    """What is added up over records in the place of learning.

    Attributes:
        noise_multiplier: noise of class sums where no mechanism says how much.
        exact: sums of another kind, of which no mechanism knows; None: class sums.
    """

    @property
    def noise_multiplier(self) -> float:
        """See the class."""

    @property
    def exact(self) -> object | None:
        """See the class."""


@dataclass(frozen=True)
class UpdateRequest:
    """One round as a mechanism sees it.

    Attributes:
        request: a name for all that was asked; the same message has the same one.
        client: name of the client, for what is seeded.
        task, phase, stage, server_round: of the instruction.
        data: the client's own examples, tokenised.
        record_ids: which record each of them is; as long as ``data``.
        records: task to the number of the client's own records, all tasks of the run.
        site_records: number of all the client's records, whatever the run asks for.
        ids: whose the client's own records of the task are; of groups, their own names.
        generator: orders ordinary batches.
        entries: how many numbers learn.
        evaluated: number of tasks whose test records are counted; 0: none are.
        masked: whether nothing is seen of the counts but their sum over clients.
        counted: names of the counts that are taken on them.
        grouping: of the records; None: the experiment protects no groups.
        sites: in the secure sum that the answer goes into; 0: into none.
        statistics: what is added up; None: something is learnt.
        joint_tasks: all tasks whose records are read, where there are several.
    """

    request: str
    client: str
    task: str
    phase: str
    stage: int
    server_round: int
    data: Sequence[Encoded]
    record_ids: Sequence[RecordId]
    records: Callable[[], Mapping[str, int]]
    site_records: Callable[[], int]
    ids: Callable[[], Sequence[str]]
    generator: torch.Generator
    entries: int = 0
    evaluated: int = 0
    masked: bool = False
    counted: tuple[str, ...] = ()
    grouping: Grouping | None = None
    sites: int = 0
    statistics: SumRequest | None = None
    joint_tasks: tuple[str, ...] = ()


@runtime_checkable
class GradientSum(Protocol):
    """One sum over a client's records as it may leave, of gradients for a step that others take or
    of embeddings."""

    @property
    def sample_rate(self) -> float:
        """Probability that a record is in the sum."""

    def rehearse(self, module: nn.Module, objective: ExampleLosses, probes: int) -> None:
        """As :meth:`Gradients.rehearse`."""

    def total(self, module: nn.Module, objective: ExampleLosses) -> Mapping[str, NDArray[Any]]:
        """Return key of each trained factor to its sum, in whole numbers."""

    def class_sums(
        self, embeddings: Tensor, targets: Tensor, labels: int, first: int = 0
    ) -> NDArray[Any]:
        """Return sums of embeddings by label and, in the last column, counts, ``(labels, size +
        1)``, in whole numbers.

        Args:
            embeddings: of some of the data, one after the other, ``(examples, size)``.
            targets: their labels, ``(examples,)``.
            labels: how many there are.
            first: place of the first of them in the data.
        """

    @property
    def data(self) -> Sequence[Encoded]:
        """The examples that may be read."""


@dataclass(frozen=True)
class Permit:
    """Leave to train for one request; given, or refused, before any record is read.

    Attributes:
        gradients: what the training gets its steps from.
        release: of what was trained; charges it, and returns what may leave.
        noise_only: gradients that read no record, for a training that has failed: where they are
            given, an answer must not tell that it has.
    """

    gradients: Gradients | GradientSum
    release: Callable[[LocalUpdate], LocalUpdate]
    noise_only: Gradients | GradientSum | None = None


class Mechanism(Protocol):
    """One mechanism for one experiment.

    Attributes:
        unit: what it protects: ``record`` or ``group``; None: nothing.
    """

    @property
    def unit(self) -> str | None:
        """What it protects."""

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Server: which of the factors that the aggregation rule would train learn in a round."""

    def permit(self, request: UpdateRequest, site: Site) -> Permit | LocalUpdate:
        """Client: return leave to train, or the update that the same request was answered with.

        Raises:
            Refusal: the site takes no part.
        """

    def count(self, request: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """Client: counts of right answers on test records, as experiment and policy let them go.

        Raises:
            Refusal: they do not.
        """


def release(
    mechanism: Mechanism,
    request: UpdateRequest,
    site: Site,
    train: Callable[[Gradients | GradientSum], LocalUpdate],
) -> LocalUpdate:
    """Ask for leave, and train.

    Args:
        mechanism: of the experiment, at a client.
        request: what is asked.
        site: whose it is.
        train: one local training with these gradients, on their data alone.

    Returns:
        What may leave; it is charged before. The mechanism's earlier answer, where it has one.

    Raises:
        Refusal: the site takes no part, or its budget is spent.
        RehearsalFailed: no record has to do with it.
        TrainingFailed: ``train`` fails on noise alone as well; that is charged, as it may tell what
            the noised gradients of records were.
        Exception: ``train`` fails, and nothing is protected.
    """
    permit = mechanism.permit(request, site)
    if not isinstance(permit, LocalUpdate):
        permit = permit.release(_trained(train, permit))
    if FAILED in permit.arrays:
        raise TrainingFailed("a private training has failed, and so has one on noise alone")
    return permit


def _trained(
    train: Callable[[Gradients | GradientSum], LocalUpdate], permit: Permit
) -> LocalUpdate:
    """Return the update; where a private training fails on its records, that of noise alone. So an
    answer does not tell that something has failed; the log here does. Where both fail, ``FAILED``.

    Raises:
        RehearsalFailed: no record was read.
        Exception: a training without protection fails.
    """
    try:
        return train(permit.gradients)
    except RehearsalFailed:
        raise
    except Exception:
        if permit.noise_only is None:
            raise
        log.exception("a private training has failed; noise alone leaves")
    try:
        return train(permit.noise_only)
    except Exception:
        log.exception("a training on noise alone has failed; its charge stays")
        return LocalUpdate({FAILED: np.zeros(0, np.float32)}, {})
