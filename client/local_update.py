"""One request, one answer, without Flower: what a client computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from client.request_check import check_tasks, check_training
from client.resources import ClientTask, Workbench
from client.state import FeedbackStore, RoundStore, TaskStore, digest
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, fingerprint
from deal_core.lora.attach import at_task_start, read, set_trainable
from deal_core.lora.state import State
from deal_core.methods import EmbeddedTask, LocalTask, Phase, Statistics, TaskDataset, TaskHistory
from deal_core.models import has_label_logits
from deal_core.privacy.interface import (
    Counts,
    LocalUpdate,
    Mechanism,
    Refusal,
    Site,
    UpdateRequest,
    release,
)
from deal_core.privacy.mechanisms.none import PublicTexts
from deal_core.privacy.policy import require_adapter, require_mechanism
from deal_core.randomness import seeded
from deal_core.training.cache import Cache
from deal_core.training.distillation import joint_labels
from deal_core.training.embedding import embeddings
from deal_core.training.evaluation import answer_space, by_head, by_name, count_both, count_correct
from deal_core.training.gradients import Gradients
from deal_core.training.loop import load_state, run_local_steps
from deal_core.wire.adapter_record import EXACT, frozen_factors, pack_update
from deal_core.wire.codec import Encoded
from deal_core.wire.counts import CORRECT, CORRECT_ALL, EXAMPLES, count_names
from deal_core.wire.instruction import Instruction
from deal_core.wire.sums import pack_sums


@dataclass(frozen=True)
class ClientContext:
    """Whose work it is: the number of the ``client``, the ``store`` of what its code lost, and
    what the privacy mechanism must know of its ``site``."""

    client: int
    store: FeedbackStore
    site: Site


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

    Raises:
        Refusal: the client has no data for it, no budget, or a policy against it.
    """
    config, phase = bench.experiment, bench.phase(instruction.phase)
    require_policy(config, client_context.site)
    if phase.statistics is not None:
        require_sums(bench.mechanism, client_context.site)
    check_training(instruction, bench, client_context.site.policy)
    seen = _spaces(bench, instruction.seen)
    future = partial(_spaces, bench, instruction.future)
    data = _data(bench, client_context.client, instruction.task, phase, seen)
    joint_tasks = [_share(bench, task, client_context.client) for task in instruction.tasks]
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
    )

    def train(gradients: Gradients) -> LocalUpdate:
        if phase.statistics is not None:
            return _summed(bench, client_context, state, instruction, phase.statistics)
        task = LocalTask(
            data.labels, seen, *_kept(bench, client_context, instruction), joint_tasks, future
        )
        cache = (
            data.cache
            if phase.public_path
            else bench.learning(client_context.client, instruction.task)
        )
        return _train(bench, client_context, state, instruction, task, cache, gradients)

    return release(_mechanism(bench, phase), ask, client_context.site, train)


def _mechanism(bench: Workbench, phase: Phase) -> Mechanism:
    """By whose data are read: public texts are nobody's, all else is protected as the experiment
    says (:func:`_data` reads the one or the other)."""
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
    known = sum(1 for _ in takewhile(set(instruction.seen).__contains__, past_tasks))
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
    """The one local training, and its update as it travels; the mechanism says with ``gradients``
    which data are read."""
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


def _summed(
    bench: Workbench,
    client_context: ClientContext,
    state: State,
    instruction: Instruction,
    statistics: Statistics,
) -> LocalUpdate:
    """The sums over the client's records of every task that it is asked about."""
    started = time.monotonic()
    tasks = instruction.tasks or (instruction.task,)
    shares = [bench.task(task, client_context.client) for task in tasks]
    parts = [
        statistics.collect(
            EmbeddedTask(
                _embeddings(bench, share, state),
                partial(_start_embeddings, bench, share, state),
                torch.tensor([item.target for item in share.train], dtype=torch.long),
                len(share.labels),
                state.heads.get(task),
            )
        )
        for task, share in zip(tasks, shares, strict=True)
    ]
    examples = sum(len(share.train) for share in shares)
    figures = {"num_examples": examples, "seconds": time.monotonic() - started}
    return LocalUpdate(pack_sums(parts), figures)


def _embeddings(bench: Workbench, share: ClientTask, state: State) -> Tensor:
    """Of the training texts; not made again while the model is what it was."""

    def make() -> Tensor:
        load_state(bench.model, state)
        return embeddings(bench.model, share.train)

    basis = [fingerprint(part) for part in state.parts()]
    found: Tensor = share.cache.get_or_compute("embeddings", basis, make)
    return found


def _start_embeddings(bench: Workbench, share: ClientTask, state: State) -> Tensor:
    """The same of the model at the start of the task."""
    load_state(bench.model, state)
    with at_task_start(bench.model.module):
        return embeddings(bench.model, share.train)


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
    probes = bench.probes(tuple(task.labels))
    alone = replace(task, past=None, round_state=None)
    set_trainable(bench.model.module, trained)
    objective = phase.objective(bench.model, state, alone, probes, Cache())
    gradients.rehearse(bench.model.module, objective, len(probes))


def require_policy(config: Experiment, site: Site) -> None:
    """Check that the site trains under the experiment's mechanism, and such adapters.

    Raises:
        Refusal: it does not.
    """
    try:
        require_mechanism(config.privacy.mechanism, site.policy)
        require_adapter(config.adapter, site.policy)
    except UserError as error:
        raise Refusal("policy", str(error)) from None


def require_sums(mechanism: Mechanism, site: Site) -> None:
    """Check that sums over single records may leave: they carry no noise.

    Raises:
        Refusal: a mechanism protects the records, or the site's policy keeps sums.
    """
    if mechanism.unit is not None:
        raise Refusal("policy", "sums of embeddings have no noise: no mechanism protects them")
    if site.policy is not None and not site.policy.share_sums:
        raise Refusal("policy", "the site's policy keeps sums of embeddings (policy.share_sums)")


def require_enough_of_each(tasks: Sequence[TaskDataset], site: Site) -> None:
    """Check that no sums are of fewer records than the policy lets go: of several tasks each has
    its own.

    Raises:
        Refusal: one has fewer, and some.
    """
    least = site.policy.min_records if site.policy is not None else 0
    if any(0 < len(task.data) < least for task in tasks):
        raise Refusal("no-data", f"fewer than {least} records of one of the tasks")


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
) -> Encoded:
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


def local_evaluation(
    bench: Workbench,
    client_context: ClientContext,
    state: State,
    instruction: Instruction,
    request: str,
) -> Counts:
    """Return ``correct``, ``examples`` and, where the model scores all labels at once,
    ``correct_all`` on the client's test share of every task asked for, as the privacy mechanism
    lets them go.

    Raises:
        Refusal: they do not leave the site.
    """
    check_tasks(instruction, bench)

    all_labels = has_label_logits(bench.experiment.model)

    def make() -> Counts:
        shares = {task: bench.task(task, client_context.client) for task in instruction.tasks}
        right = [
            _right(bench, task, share, state, instruction.learnt if all_labels else None)
            for task, share in shares.items()
        ]
        counts = {
            CORRECT: [own for own, _ in right],
            EXAMPLES: [len(share.test) for share in shares.values()],
        }
        return (
            {**counts, CORRECT_ALL: [among_all for _, among_all in right]} if all_labels else counts
        )

    ask = UpdateRequest(
        request=f"evaluate {request}",
        client=str(client_context.client),
        task="",
        phase="evaluate",
        stage=instruction.stage,
        server_round=instruction.server_round,
        data=(),
        record_ids=(),
        records=lambda: bench.records(client_context.client),
        site_records=lambda: bench.site_records(client_context.client),
        ids=lambda: (),
        learning_rate=0.0,
        generator=seeded(
            bench.experiment.run.seed, "evaluate", client_context.client, instruction.stage
        ),
        evaluated=len(instruction.tasks),
        counted=count_names(all_labels),
    )
    return bench.mechanism.count(ask, client_context.site, make)


def _right(
    bench: Workbench, task: str, share: ClientTask, state: State, learnt: Sequence[str] | None
) -> tuple[int, int]:
    """Right answers among the task's own labels, and among those of all tasks ``learnt`` as well
    (None: not asked about); not counted again while nothing that they depend on has changed."""

    def count() -> tuple[int, int]:
        load_state(bench.model, state)
        if learnt is None:
            return count_correct(bench.model, share.test, share.labels), 0
        spaces = {name: bench.labels(name) for name in learnt}
        shared = bench.experiment.stream.shared_labels
        space = answer_space(task, share.labels, spaces, shared)
        if task in state.heads:
            score = by_head(bench.model, space, state.heads)
        else:
            score = by_name(bench.model, [label for _, label in space.columns])
        return count_both(score, share.test, space)

    if not share.test:
        return 0, 0
    right: tuple[int, int] = share.cache.get_or_compute("right", (state, learnt), count)
    return right
