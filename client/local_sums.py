"""The sums of a client's records that a phase of statistics asks for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from client.rehearsal import rehearse_embeddings
from client.resources import Workbench
from deal_core.config.experiment import Experiment
from deal_core.lora.state import State
from deal_core.methods import EmbeddedTask, Statistics, TaskDataset
from deal_core.models import embedding_size
from deal_core.privacy.interface import GradientSum, LocalUpdate, Mechanism, Refusal, Site
from deal_core.privacy.policy import at_server, protects
from deal_core.wire.instruction import Instruction
from deal_core.wire.secure_layout import CLASS_SUMS
from deal_core.wire.sums import pack_sums


def require_sums(config: Experiment, mechanism: Mechanism, site: Site) -> None:
    """Check that sums over single records may leave: with noise in them, or where the site lets
    them go without. A mask alone is not enough: of a label that one site alone has, a sum over
    sites is that site's.

    Raises:
        Refusal: no noise protects the records that a mechanism should, or the site's policy keeps
            sums.
    """
    if mechanism.unit is not None and not at_server(config):
        raise Refusal("policy", "sums of embeddings have no noise: no mechanism protects them")
    if protects(config.privacy, site.policy):
        return
    if site.policy is not None and not site.policy.share_sums:
        raise Refusal("policy", "the site's policy keeps sums of embeddings (policy.share_sums)")


def enough_of_each(tasks: Sequence[TaskDataset], site: Site) -> list[TaskDataset]:
    """Return the tasks, with no record of those that have fewer than the policy lets go: each of
    several tasks has sums of its own."""
    least = site.policy.min_records if site.policy is not None else 0
    return [task if len(task.data) >= least else TaskDataset(task.labels, []) for task in tasks]


def noisy_sums(
    bench: Workbench,
    client: int,
    instruction: Instruction,
    statistics: Statistics,
    gradients: GradientSum,
) -> LocalUpdate:
    """Return class sums over the client's records of a task with its share of the noise."""
    started, size = time.monotonic(), embedding_size(bench.experiment.model, statistics.layers)
    labels, embeddings = bench.labels(instruction.task), torch.zeros(0, size)
    targets = torch.tensor([item.target for item in gradients.data], dtype=torch.long)
    asks = bench.instruction(instruction.task)
    rehearse_embeddings(bench, labels, asks, statistics.layers)
    if len(targets):
        share = bench.task(instruction.task, client)
        embeddings = bench.embeddings(share, "train", statistics.layers)
    total = gradients.class_sums(embeddings, targets, len(labels))
    figures = {"num_examples": 1.0, "seconds": time.monotonic() - started}
    return LocalUpdate({CLASS_SUMS: total}, figures)


def sum_records(
    bench: Workbench,
    client: int,
    state: State,
    instruction: Instruction,
    statistics: Statistics,
    given: Sequence[TaskDataset],
) -> LocalUpdate:
    """Return the sums over the client's records of every task that it is asked about; ``given``:
    the records, which are all of a task or none."""
    started = time.monotonic()
    tasks = instruction.tasks or (instruction.task,)
    nothing = torch.zeros(0, embedding_size(bench.experiment.model, statistics.layers))
    parts = [
        statistics.collect(
            EmbeddedTask(
                bench.embeddings(bench.task(task, client), "train", statistics.layers)
                if own.data
                else nothing,
                torch.tensor([item.target for item in own.data], dtype=torch.long),
                len(own.labels),
                state.heads.get(task),
            )
        )
        for task, own in zip(tasks, given, strict=True)
    ]
    examples = sum(len(own.data) for own in given)
    figures = {"num_examples": examples, "seconds": time.monotonic() - started}
    if bench.experiment.aggregation.secure:  # a layout of its own, of float64
        named = {
            f"{place}.{name}": value.numpy()
            for place, sums in enumerate(parts)
            for name, value in sums.items()
        }
        return LocalUpdate(named, figures)
    form = statistics.at(bench.experiment.wire.dtype)
    packed = pack_sums([form.pack(sums) for sums in parts], form.codes)
    return LocalUpdate(packed, figures)
