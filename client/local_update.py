"""A request for an update, and the answer, without Flower: what a client learns."""

from __future__ import annotations

import math

from client.client_context import ClientContext
from client.gate import require_allowed
from client.local_sums import worked_on
from client.local_training import LocalTraining, own_share
from client.resources import Workbench
from deal_core.lora.attach import entries_of
from deal_core.lora.state import State
from deal_core.methods import Phase, TaskDataset, under_all_labels
from deal_core.privacy.interface import Grouping, LocalUpdate, RecordId, UpdateRequest, release
from deal_core.randomness import seeded
from deal_core.wire.instruction import Instruction


def local_update(
    bench: Workbench,
    client_context: ClientContext,
    state: State,
    instruction: Instruction,
    request: str,
    sites: int = 0,
) -> LocalUpdate:
    """Train the current adapter as the phase wants it, on the client's share of the task, or of all
    tasks that are to be learnt at once; as the privacy mechanism allows it.

    Args:
        bench: model, method and tokenised data of this process.
        client_context: whose data they are.
        state: the adapters as they arrived.
        instruction: task, phase and factors to train.
        request: a name for the request, to answer it twice with the same.
        sites: in the secure sum that it goes into; 0: into none.

    Returns:
        The update as it may leave: the trained factors, or the sums that the phase is made of.

    Raises:
        Refusal: the client has no data for it, no budget, or a policy against it.
    """
    phase, site, client = bench.phase(instruction.phase), client_context.site, client_context.client
    require_allowed(bench, client_context, instruction)
    data = bench.task(instruction.task, client)
    joint_tasks = _joint_tasks(bench, client, instruction, phase)
    if phase.statistics is not None:
        joint_tasks = worked_on(bench, instruction, joint_tasks, site)
    grouping = bench.grouping(instruction.task, client)
    units = len(data.train) if grouping is None else len(set(grouping.numbers))
    training = LocalTraining(bench, client_context, state, instruction, data, joint_tasks, units)
    ask = _request(training, request, grouping, sites)
    update = release(bench.mechanism, ask, site, training.update)
    training.save()
    return update


def _request(
    training: LocalTraining, request: str, grouping: Grouping | None, sites: int
) -> UpdateRequest:
    """What the privacy mechanism must know of the training."""
    bench, instruction = training.bench, training.instruction
    client, joint_tasks = training.client_context.client, training.joint_tasks
    where = instruction.stage, instruction.server_round
    together = list(zip(instruction.tasks, joint_tasks, strict=True))
    data, record_ids = training.data.train, training.data.record_ids
    if together:
        data = [each for _, share in together for each in share.data]
        record_ids = [
            RecordId(task, row) for task, share in together for row in range(len(share.data))
        ]
    return UpdateRequest(
        request=f"{instruction.phase} {request}",
        client=str(client),
        task=instruction.task,
        phase=instruction.phase,
        stage=instruction.stage,
        server_round=instruction.server_round,
        data=data,
        record_ids=record_ids,
        records=lambda: bench.records(client),
        site_records=lambda: bench.site_records(client),
        ids=lambda: bench.ids(instruction.task, client),
        learning_rate=bench.experiment.train.learning_rate,
        generator=seeded(bench.experiment.run.seed, "train", client, *where),
        entries=_entries(bench, training.state, instruction),
        grouping=grouping,
        sites=sites,
        statistics=bench.phase(instruction.phase).statistics,
        joint_tasks=tuple(task for task, share in together if share.data),
    )


def _entries(bench: Workbench, state: State, instruction: Instruction) -> int:
    """Return how many numbers an update is made of."""
    statistics = bench.phase(instruction.phase).statistics
    if statistics is not None:
        shapes = statistics.shapes(len(bench.labels(instruction.task)), bench.experiment.model)
        return sum(math.prod(shape) for shape in shapes.values())
    return entries_of(state.current, frozenset(instruction.trained))


def _joint_tasks(
    bench: Workbench, client: int, instruction: Instruction, phase: Phase
) -> list[TaskDataset]:
    """The client's shares of all tasks that are learnt at once; none where it is one."""
    shares = [own_share(bench, client, task) for task in instruction.tasks]
    if bench.experiment.stream.joint_labels == "all" and phase.statistics is None:
        return under_all_labels(shares)
    return shares
