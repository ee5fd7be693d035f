"""One task divided among simulated clients.

The training examples of a task are divided by a rule of ``PARTITIONERS``; every example
goes to exactly one client. The test examples follow: each goes to exactly one client,
those of a label in proportion to the clients' shares of that label's training examples
(by column: to the client of their group). The division depends on the task, the
configuration, the number of clients and the seed alone.

Where groups of records are protected (``privacy.unit_column``), all examples of one go to the same
client: the rules then divide groups, each as if it were one example with its commonest label, and
``iid`` gives a group to the same client in every task. Not by column: whoever names the client by a
column has said who has what.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from deal_core.config.data import PartitionConfig
from deal_core.data.source import Example, TaskData, by_label, largest_remainder
from deal_core.errors import UserError, choose

if TYPE_CHECKING:
    from datasets import Dataset


Owners: TypeAlias = list[list[int]]
"""Indices of the examples, or groups, of each client; disjoint."""
Partitioner: TypeAlias = Callable[[TaskData, PartitionConfig, int, int], Owners]
"""Task, configuration, number of clients and seed of this task to owners."""

SHARES = 10**9
"""A whole, where shares are whole numbers."""
MIN_EXAMPLES = 8
"""Training examples that a Dirichlet draw should leave to every client."""


def partition(task: TaskData, config: PartitionConfig, clients: int, seed: int) -> list[TaskData]:
    """Return each client's part of ``task``, in client order; ``labels`` stay whole.

    A client may end up without test examples (it holds little of every label) or, with
    an extreme configuration, without training examples: it then sits the task out.
    Examples keep their order.

    Raises:
        UserError: unknown kind, more clients than training examples, or a configuration
            that cannot give every example an owner.
    """
    divide = choose("data.partition.kind", config.kind, PARTITIONERS)
    groups = config.kind != "column" and any(e.unit for e in (*task.train, *task.test))
    units = len({example.unit for example in task.train}) if groups else len(task.train)
    if clients > units and config.kind != "column":  # there a client without rows sits it out
        raise UserError(
            f"task '{task.name}': {units} training {'groups' if groups else 'examples'} for "
            f"{clients} clients; lower federation.clients, or add rows (data.max_train limits them)"
        )
    task_seed = _seed(seed, task.name)
    if groups:
        whole = one_each(task)
        if config.kind == "iid":
            owners = by_name(whole.train_units, clients, seed)
        else:
            owners = divide(whole.task, config, clients, task_seed)
        train = whole.train_rows(owners)
        test = whole.test_rows(owners, _follow(whole.task, owners, random.Random(task_seed)))
    elif config.kind == "column":
        train = [sorted(indices) for indices in divide(task, config, clients, task_seed)]
        test = _by_group(task, task.test, clients)
    else:
        train = [sorted(indices) for indices in divide(task, config, clients, task_seed)]
        test = _follow(task, train, random.Random(task_seed))
    return [
        replace(
            task,
            train=tuple(task.train[index] for index in train[client]),
            test=tuple(task.test[index] for index in sorted(test[client])),
        )
        for client in range(clients)
    ]


def _seed(seed: int, name: str) -> int:
    # hash() differs between processes; a digest does not.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _iid(task: TaskData, _config: PartitionConfig, clients: int, seed: int) -> Owners:
    """Equal parts of a shuffled task."""
    from flwr_datasets.partitioner import IidPartitioner

    rows = _rows(task).shuffle(seed=seed, keep_in_memory=True)
    return _divide(IidPartitioner(num_partitions=clients), rows, clients)


def _dirichlet(task: TaskData, config: PartitionConfig, clients: int, seed: int) -> Owners:
    """Return positions by client: each label divided by a draw from Dirichlet(alpha).

    A draw that leaves a client fewer than ``MIN_EXAMPLES`` (less when a quarter of an
    equal part is less) is drawn again, ten times at most. Where alpha is too small for
    that, the first draw stands, and clients may hold nothing of this task.

    Raises:
        ValueError: the library cannot divide the task at all.
        AssertionError: never; a draw without a minimum stands.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    for least in (min(MIN_EXAMPLES, len(task.train) // (4 * clients)), 0):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=least,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
        try:
            return _divide(partitioner, _rows(task), clients)
        except ValueError:
            if least == 0:
                raise
    raise AssertionError("a draw without a minimum always stands")


def _quantity(task: TaskData, config: PartitionConfig, clients: int, seed: int) -> Owners:
    """Return positions by client: a shuffled task cut into parts whose sizes are a draw from
    Dirichlet(alpha), none of them empty; labels are alike."""
    shares = np.random.default_rng(seed).dirichlet([config.alpha] * clients)
    rng = random.Random(seed)
    weights = [int(share * SHARES) for share in shares]
    more = largest_remainder(weights, len(task.train) - clients, rng)
    order = list(range(len(task.train)))
    rng.shuffle(order)
    ends = list(accumulate(1 + size for size in more))
    return [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _column(task: TaskData, _config: PartitionConfig, clients: int, _seed: int) -> Owners:
    """Return one group per client, in the groups' order; more groups than clients take turns."""
    return _by_group(task, task.train, clients)


def _by_group(task: TaskData, examples: Sequence[Example], clients: int) -> Owners:
    groups = task.groups or tuple(sorted({e.group for e in (*task.train, *task.test)}))
    if groups == ("",):
        raise UserError(
            f"task '{task.name}': data.partition.kind = \"column\" needs a data source with "
            'such a column; use data.source = "files" or "hub" and data.partition.column'
        )
    if len(groups) < clients:
        raise UserError(
            f"task '{task.name}': the partition column has {len(groups)} values for {clients} "
            f"clients; set federation.clients to {len(groups)} or fewer"
        )
    client_of = {group: position % clients for position, group in enumerate(groups)}
    owners: Owners = [[] for _ in range(clients)]
    for index, example in enumerate(examples):
        owners[client_of[example.group]].append(index)
    return owners


def _follow(task: TaskData, train: Owners, rng: random.Random) -> Owners:
    """Deal the test examples so that each client's labels are as in training."""
    labels = task.labels or ("",)
    counts: dict[str, list[int]] = {label: [0] * len(train) for label in labels}
    for client, indices in enumerate(train):
        for index in indices:
            counts[task.train[index].label][client] += 1
    owners: Owners = [[] for _ in train]
    sizes = [len(indices) for indices in train]
    for label, indices in by_label(task.test).items():
        # A label without training examples follows the sizes of the clients.
        weights = counts[label] if any(counts[label]) else sizes
        rng.shuffle(indices)
        start = 0
        for client, share in enumerate(largest_remainder(weights, len(indices), rng)):
            owners[client] += indices[start : start + share]
            start += share
    return owners


def _rows(task: TaskData) -> Dataset:
    from datasets import Dataset

    number = {label: position for position, label in enumerate(task.labels or ("",))}
    labels = [number[example.label] for example in task.train]
    return Dataset.from_dict({"index": list(range(len(labels))), "label": labels})


def _divide(partitioner: Any, rows: Dataset, clients: int) -> Owners:
    partitioner.dataset = rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns at every draw it repeats
        return [list(partitioner.load_partition(client)["index"]) for client in range(clients)]


PARTITIONERS: Mapping[str, Partitioner] = MappingProxyType(
    {
        "iid": _iid,
        "dirichlet": _dirichlet,
        "quantity": _quantity,
        "column": _column,
    }
)
"""``data.partition.kind`` to rule."""


Rows = dict[str, list[int]]
"""Group to the indices of its examples."""


@dataclass(frozen=True)
class OneEach:
    """A task with one example for each of its groups.

    Attributes:
        task: an example for each group of the training examples, and for each group that the test
            examples have alone.
        train, test: group to its examples, in the whole task.
    """

    task: TaskData
    train: Rows
    test: Rows

    @property
    def train_units(self) -> list[str]:
        """Groups of the training examples, in the order of the task's."""
        return list(self.train)

    def train_rows(self, owners: Owners) -> Owners:
        """Return the clients' training examples, from the groups that they have."""
        units = self.train_units
        return [sorted(i for n in own for i in self.train[units[n]]) for own in owners]

    def test_rows(self, owners: Owners, alone: Owners) -> Owners:
        """Return the clients' test examples.

        Args:
            owners: of the groups of training examples: their test examples go along.
            alone: of the groups that only the test examples have.
        """
        units, others = self.train_units, [unit for unit in self.test if unit not in self.train]
        found = []
        for own, own_alone in zip(owners, alone, strict=True):
            names = [*(units[n] for n in own), *(others[n] for n in own_alone)]
            found.append(sorted(i for name in names for i in self.test.get(name, ())))
        return found


def one_each(task: TaskData) -> OneEach:
    """Return the task with the commonest of each group's labels on one example."""
    train, test = rows_by_unit(task.train), rows_by_unit(task.test)
    return OneEach(
        replace(
            task,
            train=tuple(_commonest(task.train, rows) for rows in train.values()),
            test=tuple(_commonest(task.test, test[unit]) for unit in test if unit not in train),
        ),
        train,
        test,
    )


def rows_by_unit(examples: Sequence[Example]) -> Rows:
    """Return the indices of every group's examples, groups in the order in which they occur."""
    found: Rows = {}
    for index, example in enumerate(examples):
        found.setdefault(example.unit, []).append(index)
    return found


def by_name(units: Sequence[str], clients: int, seed: int) -> Owners:
    """Return groups by client, evenly at random: by a hash of the group's name and the seed alone,
    so that one has the same client in every task."""
    owners: Owners = [[] for _ in range(clients)]
    for index, unit in enumerate(units):
        digest = hashlib.sha256(f"{seed}/group/{unit}".encode()).digest()
        owners[int.from_bytes(digest[:8], "big") % clients].append(index)
    return owners


def _commonest(examples: Sequence[Example], rows: Sequence[int]) -> Example:
    """Return the first example with the commonest label; of equally common ones, the first."""
    labels = Counter(examples[i].label for i in rows)
    label = max(labels, key=lambda name: labels[name])
    return next(examples[i] for i in rows if examples[i].label == label)
