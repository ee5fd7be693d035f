"""The sums of a client's records that a phase of statistics asks for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from client.given_sums import GivenSums
from client.rehearsal import rehearse_embeddings
from client.resources import Workbench
from deal_core.data.public import public_texts, texts_digest
from deal_core.lora.state import State
from deal_core.methods import EmbeddedTask, Statistics, TaskDataset
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.interface import GradientSum, LocalUpdate, Site
from deal_core.wire.instruction import Instruction
from deal_core.wire.secure_layout import CLASS_SUMS


def worked_on(
    bench: Workbench, instruction: Instruction, tasks: Sequence[TaskDataset], site: Site
) -> list[TaskDataset]:
    """Return the tasks whose records are added up, with no record of those that the client has not
    worked on, or has fewer of than the policy lets go: each of several has sums of its own."""
    least = site.policy.min_records if site.policy is not None else 0
    own = {instruction.task, *instruction.past}
    if bench.experiment.stream.schedule == "joint":
        own |= set(instruction.tasks)
    return [
        each if name in own and len(each.data) >= least else TaskDataset(each.labels, [])
        for name, each in zip(instruction.tasks, tasks, strict=True)
    ]


def class_sums(
    bench: Workbench,
    client: int,
    instruction: Instruction,
    statistics: Statistics,
    gradients: GradientSum,
    tasks: Sequence[TaskDataset],
    given: GivenSums | None = None,
) -> LocalUpdate:
    """Return class sums over the client's records of every task that it is asked about, with its
    share of the noise.

    Args:
        bench: model and tokenised data.
        client: whose records.
        instruction: what is asked.
        statistics: what is added up.
        gradients: adds it up, and says which records may be read.
        tasks: of several tasks the records, which are those of ``gradients`` in this order; none:
            there is one.
        given: of a site without a mechanism: what it gave before, it gives again.

    Raises:
        Refusal: it gave another form of them before.
    """
    started, size = time.monotonic(), statistics.size(bench.experiment.model)
    found: dict[str, NDArray[Any]] = {}
    records, first = [len(each.data) for each in tasks] or [len(gradients.data)], 0
    for place, task in enumerate(instruction.tasks or (instruction.task,)):
        labels, data = bench.labels(task), gradients.data[first : first + records[place]]
        rehearse_embeddings(bench, labels, bench.instruction(task), statistics.layers)
        vectors, share = torch.zeros(0, size), bench.task(task, client)
        if data:
            vectors = bench.vectors(share, "train", statistics)
        targets = torch.tensor([item.target for item in data], dtype=torch.long)
        add = partial(gradients.class_sums, vectors, targets, len(labels), first)
        first += len(data)
        name = f"{place}.{CLASS_SUMS}"
        if given is None or not data:
            found[name] = add()
            continue
        assert isinstance(gradients, NoisySum)
        form = _form(bench, statistics, labels)
        found[name] = given.once(task, form, gradients.shares, add)
    return LocalUpdate(found, {"num_examples": 1.0, "seconds": time.monotonic() - started})


def _form(bench: Workbench, statistics: Statistics, labels: Sequence[str]) -> str:
    """Return all that decides how records of a task are added up, but the records."""
    config = bench.experiment
    texts = public_texts(config.data, bench.spaces(bench.tasks))
    vectors = config.model.name, statistics.layers, statistics.directions, texts_digest(texts)
    noise = statistics.noise_multiplier, config.privacy.max_grad_norm
    return repr((*vectors, *noise, tuple(labels)))


def exact_sums(
    bench: Workbench,
    client: int,
    state: State,
    instruction: Instruction,
    statistics: Statistics,
    tasks: Sequence[TaskDataset],
) -> LocalUpdate:
    """Return sums of another kind over the client's records of every task that it is asked for."""
    started = time.monotonic()
    assert statistics.exact is not None
    nothing = torch.zeros(0, statistics.size(bench.experiment.model))
    found: dict[str, NDArray[Any]] = {}
    for place, task in enumerate(instruction.tasks or (instruction.task,)):
        own, share = tasks[place], bench.task(task, client)
        vectors = bench.vectors(share, "train", statistics) if own.data else nothing
        targets = torch.tensor([item.target for item in own.data], dtype=torch.long)
        embedded = EmbeddedTask(vectors, targets, len(own.labels), state.heads.get(task))
        sums = statistics.exact.collect(embedded)
        found |= {f"{place}.{name}": value.numpy() for name, value in sums.items()}
    examples = sum(len(own.data) for own in tasks)
    return LocalUpdate(found, {"num_examples": examples, "seconds": time.monotonic() - started})
