"""What a client asks of a privacy mechanism, and the gradients that it gets: all that training
knows of privacy."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deal_core.models.interface import Encoded
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import Policy

Probes = Sequence[Encoded]
"""Constant texts, tokenised: what is found on them tells nothing of any record."""

FAILED = "failed"
"""Name of the one array of what is charged where a training has failed on noise alone as well."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalUpdate:
    """What one local training made: arrays as they travel, and what goes with them:
    ``num_examples`` (weight in the average) and more."""

    arrays: Mapping[str, NDArray[Any]]
    figures: Mapping[str, float]


Train = Callable[[Any], LocalUpdate]
"""One local training with the :class:`~deal_core.privacy.dpsgd.PrivateGradients`, or for one sum
over records the :class:`~deal_core.privacy.distributed_noise.NoisySum`, that it is given, on their
data alone; None: with ordinary gradients of all that was asked about."""


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
    """What a mechanism needs of a site."""

    ledger: Callable[[], Ledger]
    """Opened when it is first needed."""
    policy: Policy | None
    """None: the site has none, and does what the experiment asks."""
    simulated: bool
    """Whether this is a simulated client, whose noise may be seeded."""
    run: str = ""
    """Whose releases these are: one run, as asked for, whatever the site has decided and however
    often it is resumed; empty: the settings alone say it."""


class RecordId(NamedTuple):
    """Which record an example is: the task whose data it was read from, and its row there."""

    task: str
    row: int


@dataclass(frozen=True)
class UpdateRequest:
    """One round as a mechanism sees it. A unit is what is protected: a record, or a group."""

    request: str
    """A name for all that was asked; the same message has the same one."""
    client: str
    """For what is seeded."""
    task: str
    phase: str
    stage: int
    server_round: int
    units: Callable[[], Mapping[str, int]]
    """Task to the number of the client's units, all tasks of the run; one in several tasks counts
    in each."""
    site_units: Callable[[], int]
    """The same over all the client's tasks, whatever the run asks for."""
    data: Sequence[Encoded] = ()
    """The client's own examples."""
    record_ids: Sequence[RecordId] = ()
    """Of each of them."""
    groups: Sequence[int] | None = None
    """Group of each, from 0; these numbers never leave the client. None: there are none."""
    ids: Callable[[], Sequence[str]] = tuple
    """Names of the units of the task, the same in every task."""
    entries: int = 0
    """How many numbers learn, or are summed."""
    sums_noise: float | None = None
    """Class sums are taken in the place of gradients, with this noise multiplier where no mechanism
    says another; None: they are not."""
    sites: int = 0
    """In the secure sum that the answer goes into; 0: into none."""
    joint_tasks: tuple[str, ...] = ()
    """All tasks whose records are read, where there are several."""


class Mechanism(Protocol):
    """One privacy mechanism for one experiment."""

    @property
    def unit(self) -> str | None:
        """What it protects: ``record`` or ``group``; None: nothing."""

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Server: which of the factors that the aggregation rule would train learn in a round."""

    def update(self, ask: UpdateRequest, site: Site, train: Train) -> LocalUpdate:
        """Client: return the update that may leave, charged before; the earlier answer to the same
        request, where there is one.

        Raises:
            BudgetSpent: by the ledger, before any record is read, or at the charge.
            OutsidePlan: no record was read.
            RehearsalFailed: no record has to do with it.
            TrainingFailed: ``train`` fails on noise alone as well; that is charged, as it may tell
                what the noised gradients of records were.
            Exception: ``train`` fails, and nothing is protected.
        """


def trained_or_noise(train: Train, gradients: Callable[[bool], Any]) -> LocalUpdate:
    """Return the update; where a private training fails on its records, that of noise alone. So an
    answer does not tell that something has failed; the log here does. Where both fail, ``FAILED``.

    Args:
        train: one local training.
        gradients: over the records, or, given False, the same on none.

    Raises:
        RehearsalFailed: no record was read.
    """
    try:
        return train(gradients(True))
    except RehearsalFailed:
        raise
    except Exception:
        log.exception("a private training has failed; noise alone leaves")
    try:
        return train(gradients(False))
    except Exception:
        log.exception("a training on noise alone has failed; its charge stays")
        return LocalUpdate({FAILED: np.zeros(0, np.float32)}, {})
