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
from dataclasses import replace
from itertools import accumulate
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
    by_column = config.kind == "column"
    grouped = not by_column and any(e.unit for e in (*task.train, *task.test))
    units = task.units(grouped)
    if clients > units and not by_column:  # there a client without rows sits it out
        raise UserError(
            f"task '{task.name}': {units} training {'groups' if grouped else 'examples'} for "
            f"{clients} clients; lower federation.clients, or add rows (data.max_train limits them)"
        )
    task_seed = _seed(seed, task.name)
    if grouped:
        train, test = _whole_groups(task, config, clients, seed)
    else:
        train = divide(task, config, clients, task_seed)
        test = (
            _by_group(task, task.test, clients)
            if by_column
            else _follow(task, train, random.Random(task_seed))
        )
    return [
        replace(
            task,
            train=tuple(task.train[index] for index in sorted(train[client])),
            test=tuple(task.test[index] for index in sorted(test[client])),
        )
        for client in range(clients)
    ]


def _whole_groups(
    task: TaskData, config: PartitionConfig, clients: int, seed: int
) -> tuple[Owners, Owners]:
    """Return training and test examples by client, where all of a group go to one: groups are
    divided, each as if it were one example with the commonest of its labels. Test examples go along
    with their group's training examples; a group that has none follows the labels."""
    train, test = _rows_by_unit(task.train), _rows_by_unit(task.test)
    units, others = list(train), [unit for unit in test if unit not in train]
    ones = replace(
        task,
        train=tuple(_commonest(task.train, train[unit]) for unit in units),
        test=tuple(_commonest(task.test, test[unit]) for unit in others),
    )
    task_seed = _seed(seed, task.name)
    if config.kind == "iid":
        owners = _by_name(units, clients, seed)
    else:
        owners = PARTITIONERS[config.kind](ones, config, clients, task_seed)
    alone = _follow(ones, owners, random.Random(task_seed))
    named = [
        [*(units[n] for n in own), *(others[n] for n in more)]
        for own, more in zip(owners, alone, strict=True)
    ]

    def rows(of: Mapping[str, list[int]]) -> Owners:
        return [[i for unit in own for i in of.get(unit, ())] for own in named]

    return rows(train), rows(test)


def _rows_by_unit(examples: Sequence[Example]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        found.setdefault(example.unit, []).append(index)
    return found


def _commonest(examples: Sequence[Example], rows: Sequence[int]) -> Example:
    labels = Counter(examples[i].label for i in rows)
    return next(examples[i] for i in rows if examples[i].label == labels.most_common(1)[0][0])


def _by_name(units: Sequence[str], clients: int, seed: int) -> Owners:
    """Return groups by client, evenly at random: by a hash of the group's name and the seed alone,
    so that one has the same client in every task."""
    owners: Owners = [[] for _ in range(clients)]
    for index, unit in enumerate(units):
        digest = hashlib.sha256(f"{seed}/group/{unit}".encode()).digest()
        owners[int.from_bytes(digest[:8], "big") % clients].append(index)
    return owners


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
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    def draw(least: int) -> Owners:
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=least,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )
        return _divide(partitioner, _rows(task), clients)

    try:
        return draw(min(MIN_EXAMPLES, len(task.train) // (4 * clients)))
    except ValueError:
        return draw(0)


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
    labels = (*task.labels, "")
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

    number = {label: position for position, label in enumerate((*task.labels, ""))}
    labels = [number[example.label] for example in task.train]
    return Dataset.from_dict({"index": list(range(len(labels))), "label": labels})


def _divide(partitioner: Any, rows: Dataset, clients: int) -> Owners:
    partitioner.dataset = rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns at every draw it repeats
        return [list(partitioner.load_partition(client)["index"]) for client in range(clients)]


PARTITIONERS: Mapping[str, Partitioner] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
    "column": _column,
}
"""``data.partition.kind`` to rule."""
