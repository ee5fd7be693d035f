"""The data of one task as a run's clients have it, before it is divided among them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from deal_core.config.experiment import Experiment
from deal_core.data.sampling import stratified
from deal_core.data.source import Example, TaskData
from deal_core.data.sources import open_source
from deal_core.data.split import split_off_each


def load_for_clients(experiment: Experiment, task: str) -> TaskData:
    """Return a task's data within the experiment's limits.

    Where single records are protected, ``data.max_train`` and ``data.train_share`` take about so
    many: whether a record is one of them depends on that record alone. A subset of exactly so many
    would be another one, with other records in it, for a neighbouring data set. Where groups are
    protected it depends on the name of the group alone: a group is there whole, or not. So it is
    with ``data.split``, and, where counts of right answers leave with noise, with
    ``data.max_test``.

    Raises:
        UserError: see :meth:`~deal_core.data.source.DataSource.load`.
    """
    data = experiment.data
    noised = experiment.privacy.metrics == "noised" and bool(data.max_test)
    limits = bool(data.max_train) or data.train_share < 1 or bool(data.split) or noised
    if experiment.privacy.mechanism != "record" or not limits:
        return open_source(data, experiment.privacy.unit_column).load(task)
    unlimited = data.model_copy(update={"max_train": 0, "train_share": 1.0, "max_test": 0})
    whole = open_source(unlimited, experiment.privacy.unit_column).load(task)
    if whole.held_out:
        train, test = split_off_each((*whole.train, *whole.test), data.split)
        whole = replace(whole, train=train, test=test)
    share = data.train_share
    if data.max_train:
        share *= min(1.0, data.max_train / max(1, len(whole.train)))
    train = each_by_itself(whole.train, task, share)
    kept = min(1.0, data.max_test / max(1, len(whole.test)))
    tests = whole.test
    test = each_by_itself(tests, task, kept) if noised else stratified(tests, data.max_test)
    return replace(whole, train=train, test=test)


def each_by_itself(examples: Sequence[Example], task: str, share: float) -> tuple[Example, ...]:
    """About a ``share`` of the examples: those whose own hash, under the task's name, is small."""
    return tuple(example for example in examples if _place(example, task) < share)


def _place(example: Example, task: str) -> float:
    """Return a number in [0, 1) that depends on the record alone; of one of a group, on the group
    alone, so that it is the same in every task."""
    answer = (example.target,) if example.target else ()
    alone = task, example.id, example.label, example.text, *answer
    named = "\0".join(("unit", example.unit) if example.unit else alone)
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "big") / 2**64
