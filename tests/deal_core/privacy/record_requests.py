"""Requests to mechanism ``record`` at a site whose tasks have records, and no model."""

import numpy as np

from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.interface import LocalUpdate, RecordId, UpdateRequest

TASKS = ("task0", "task1", "task2")
FEW = dict.fromkeys(TASKS, 32)
"""All are in every batch: nothing is sampled, and a plan is solved at once."""


def experiment(*overrides: str):
    given = (
        "privacy.mechanism=record",
        "privacy.target_epsilon=3.0",
        "federation.rounds=4",
        "train.batch_size=32",
        *overrides,
    )
    return parse_experiment(apply_overrides({}, given), "test")


class Maker:
    """Trains nothing; says whether it was asked."""

    def __init__(self) -> None:
        self.seen: list[PrivateGradients] = []

    def __call__(self, source) -> LocalUpdate:
        self.seen.append(source)
        figures = {"num_examples": 99, "loss": 0.5, "seconds": 3.0}
        return LocalUpdate({"w": np.full((2, 2), len(self.seen), np.float32)}, figures)


def ask(
    task: str, server_round: int, records=FEW, request: str = "", each: int = 0
) -> UpdateRequest:
    """Of so many records a task; or, where ``each`` group has some, of so many groups."""
    count = records[task] * max(1, each)
    return UpdateRequest(
        request=request or f"{task} {server_round}",
        client="0",
        task=task,
        phase="learn",
        stage=int(task[-1]),
        server_round=server_round,
        data=[Encoded((1, 2), 0)] * count,
        record_ids=[RecordId(task, row) for row in range(count)],
        groups=[row // each for row in range(count)] if each else None,
        units=lambda: records,
        site_units=lambda: sum(records.values()),
        ids=lambda: [f"{task} {n}" for n in range(records[task])],
    )
