"""A request for an update, and the answer, without Flower: what a client learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile

from client.client_context import ClientContext
from client.gradient_sum import gradient_sum
from client.local_sums import noisy_sums, require_enough_of_each, require_sums, sum_records
from client.policy_check import require_policy
from client.request_check import check_training
from client.resources import ClientTask, Workbench
from client.state import FeedbackStore, RoundStore, TaskStore, digest
from deal_core.lora.adapter import Adapter
from deal_core.lora.attach import read, set_trainable
from deal_core.lora.kinds import kind_of
from deal_core.lora.learnt import entries_of
from deal_core.lora.state import State
from deal_core.methods import LocalTask, Phase, TaskDataset, TaskHistory, under_all_labels
from deal_core.models import embedding_size
from deal_core.privacy.interface import (
    GradientSum,
    LocalUpdate,
    Mechanism,
    UpdateRequest,
    rehearsing,
    release,
)
from deal_core.privacy.mechanisms.none import PublicTexts
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.training.distillation import joint_labels
from deal_core.training.gradients import Gradients
from deal_core.training.loop import load_state, run_local_steps
from deal_core.wire.adapter_record import EXACT, frozen_factors, pack_update
from deal_core.wire.codec import WireArrays
from deal_core.wire.instruction import Instruction


def local_update(
    bench: Workbench,
    client_context: ClientContext,
    state: State,
    instruction: Instruction,
    request: str,
) -> LocalUpdate:
    """Train the current adapter as the phase wants it, on the client's share of the task, or of all
    tasks that are to be learnt at once; as the privacy mechanism allows it.

    Args:
        bench: model, method and tokenised data of this process.
        client_context: whose data they are.
        state: the adapters as they arrived.
        instruction: task, phase and factors to train.
        request: a name for the request, to answer it twice with the same.

    Returns:
        The update as it may leave: the trained factors, or the sums that the phase is made of.

    Raises:
        Refusal: the client has no data for it, no budget, or a policy against it.
    """
    config, phase = bench.experiment, bench.phase(instruction.phase)
    require_policy(config, client_context.site.policy)
    if phase.statistics is not None:
        require_sums(config, bench.mechanism, client_context.site)
    check_training(instruction, bench, client_context.site.policy)
    seen = _spaces(bench, instruction.seen)
    future = partial(_spaces, bench, instruction.future)
    data = _data(bench, client_context.client, instruction.task, phase, seen)
    joint_tasks = [_share(bench, task, client_context.client) for task in instruction.tasks]
    if config.stream.joint_labels == "all" and phase.statistics is None:
        joint_tasks = under_all_labels(joint_tasks)
    if phase.statistics is not None:
        require_enough_of_each(joint_tasks, client_context.site)
    where = instruction.stage, instruction.server_round
    ask = UpdateRequest(
        request=f"{instruction.phase} {request}",
        client=str(client_context.client),
        task=instruction.task,
        phase=instruction.phase,
        stage=instruction.stage,
        server_round=instruction.server_round,
        data=[e for share in joint_tasks for e in share.data] if joint_tasks else data.train,
        record_ids=data.record_ids,
        records=lambda: bench.records(client_context.client),
        site_records=lambda: bench.site_records(client_context.client),
        ids=lambda: bench.ids(instruction.task, client_context.client),
        learning_rate=phase.learning_rate or config.train.learning_rate,
        generator=seeded(config.run.seed, "train", client_context.client, *where),
        entries=_entries(bench, state, instruction),
        grouping=(
            None if phase.public_path else bench.grouping(instruction.task, client_context.client)
        ),
    )

    def train(gradients: Gradients | GradientSum) -> LocalUpdate:
        if phase.statistics is not None and isinstance(gradients, GradientSum):
            number = client_context.client
            return noisy_sums(bench, number, instruction, phase.statistics, gradients)
        if phase.statistics is not None:
            return sum_records(bench, client_context.client, state, instruction, phase.statistics)
        past, round_state = _kept(bench, client_context, instruction)
        task = LocalTask(
            labels=data.labels,
            seen=seen,
            past=past,
            round_state=round_state,
            joint_tasks=joint_tasks,
            future=future,
            prompts=[bench.prompt(task) for task in instruction.seen],
            protected=bench.mechanism.unit is not None,
        )
        cache = (
            data.cache
            if phase.public_path
            else bench.learning(client_context.client, instruction.task)
        )
        trained = frozenset(instruction.trained)
        if isinstance(gradients, GradientSum):
            objective = partial(phase.objective, bench.model, state)
            examples = len(data.train) if ask.grouping is None else len(set(ask.grouping.numbers))
            return gradient_sum(bench, state, objective, task, trained, gradients, examples, cache)
        return _train(bench, client_context, state, instruction, task, cache, gradients)

    return release(_mechanism(bench, phase), ask, client_context.site, train)


def _entries(bench: Workbench, state: State, instruction: Instruction) -> int:
    """Return how many numbers an update is made of."""
    statistics = bench.phase(instruction.phase).statistics
    if statistics is not None:
        size = embedding_size(bench.experiment.model, statistics.layers)
        return len(bench.labels(instruction.task)) * (size + 1)
    core = kind_of(bench.experiment.adapter).core
    return entries_of(state.current, frozenset(instruction.trained), core)


def _mechanism(bench: Workbench, phase: Phase) -> Mechanism:
    """Return the mechanism for the data that are read: public texts are nobody's, all else is
    protected as the experiment says (:func:`_data` reads the one or the other)."""
    return PublicTexts(bench.experiment) if phase.public_path else bench.mechanism


def _spaces(bench: Workbench, tasks: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Public label spaces."""
    return tuple(bench.labels(task) for task in tasks)


def _kept(
    bench: Workbench, client_context: ClientContext, instruction: Instruction
) -> tuple[TaskHistory | None, RoundStore]:
    """What the client has of earlier tasks, and of earlier rounds."""
    folder = client_context.store.folder
    public = bench.phase(instruction.phase).public_path
    protected = public or bench.mechanism.unit is not None
    past_tasks = () if protected else instruction.past  # whose records no charge would name
    shares = [partial(_share, bench, task, client_context.client) for task in past_tasks]
    met = {*instruction.seen, instruction.task}  # a task that returns was met before
    known = sum(1 for _ in takewhile(met.__contains__, past_tasks))
    past = TaskHistory(shares, TaskStore(folder), known) if shares else None
    return past, RoundStore(folder, instruction.stage, instruction.server_round)


def _train(
    bench: Workbench,
    client_context: ClientContext,
    state: State,
    instruction: Instruction,
    task: LocalTask,
    cache: Cache,
    gradients: Gradients,
) -> LocalUpdate:
    """Return the update of the one local training, as it travels; the mechanism says with
    ``gradients`` which data are read."""
    started = time.monotonic()
    config, phase = bench.experiment, bench.phase(instruction.phase)
    trained, probes = frozenset(instruction.trained), bench.probes(tuple(task.labels))
    load_state(bench.model, state)
    _rehearse(bench, state, phase, task, trained, gradients)
    rate = phase.learning_rate or config.train.learning_rate
    report = run_local_steps(
        bench.model,
        phase.objective(bench.model, state, task, gradients.data, cache),
        gradients,
        trained,
        config.train.model_copy(update={"learning_rate": rate}),
    )
    gradients.finished(bench.model, task.labels, probes)
    adapter = read(bench.model.module)
    encoded = _encode(
        bench, client_context.client, adapter, state.current, instruction, client_context.store
    )
    figures = {
        "num_examples": len(gradients.data),
        "loss": report.loss,
        "seconds": time.monotonic() - started,
    }
    return LocalUpdate(encoded, figures)


def _rehearse(
    bench: Workbench,
    state: State,
    phase: Phase,
    task: LocalTask,
    trained: frozenset[str],
    gradients: Gradients,
) -> None:
    """Let the mechanism try its gradients out on constant texts: what cannot work fails here, and
    no record has to do with it."""
    if bench.mechanism.unit is None:
        return
    with rehearsing():
        probes = bench.probes(tuple(task.labels))
        alone = replace(task, past=None, round_state=None)
        set_trainable(bench.model.module, trained)
        objective = phase.objective(bench.model, state, alone, probes, Cache())
        gradients.rehearse(bench.model.module, objective, len(probes))


def _data(
    bench: Workbench, client: int, task: str, phase: Phase, seen: tuple[tuple[str, ...], ...]
) -> ClientTask:
    """The client's share of the task, or the public texts under all labels so far."""
    if not phase.public_path:
        return bench.task(task, client)
    return bench.public(phase.public_path, joint_labels((*seen, bench.labels(task))))


def _share(bench: Workbench, task: str, client: int) -> TaskDataset:
    """The client's own training data of a task; of an earlier one, read when a method asks."""
    data = bench.task(task, client)
    return TaskDataset(data.labels, data.train)


def _encode(
    bench: Workbench,
    client: int,
    adapter: Adapter,
    before: Adapter,
    instruction: Instruction,
    store: FeedbackStore,
) -> WireArrays:
    """Pack the update; keep what a lossy format lost for the client's next round."""
    where = (instruction.stage, instruction.server_round)
    trained = frozenset(instruction.trained)
    basis = f"{instruction.phase} {digest(frozen_factors(before, trained))}"
    generator = seeded(bench.experiment.run.seed, "uplink", client, *where)
    dtype = bench.experiment.wire.dtype
    feedback = store.load(*where, basis) if dtype != EXACT else {}
    encoded, lost = pack_update(adapter, before, dtype, trained, feedback, generator)
    if dtype != EXACT:
        store.save(*where, basis, lost)
    return encoded
