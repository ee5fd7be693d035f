"""One request, one answer, without Flower: what a client computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

from client.request_check import check_tasks, check_training
from client.resources import ClientTask, Workbench
from client.state import FeedbackStore, RoundStore, TaskStore, digest
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter
from deal_core.lora.attach import read, set_trainable
from deal_core.lora.state import State
from deal_core.methods import LocalTask, Past, Phase, Share
from deal_core.privacy.interface import Ask, Counts, Mechanism, Refusal, Site, Trained
from deal_core.privacy.mechanisms.none import PublicTexts
from deal_core.privacy.policy import require_adapter, require_mechanism
from deal_core.randomness import seeded
from deal_core.training.cache import Memory
from deal_core.training.distillation import merged
from deal_core.training.gradients import Gradients
from deal_core.training.loop import count_correct, descend, load_state
from deal_core.wire.adapter_record import EXACT, frozen_factors, pack_update
from deal_core.wire.codec import Encoded
from deal_core.wire.instruction import Instruction


@dataclass(frozen=True)
class Desk:
    """Whose work it is: the number of the ``client``, the ``store`` of what its code lost, and
    what the privacy mechanism must know of its ``site``."""

    client: int
    store: FeedbackStore
    site: Site


def local_update(
    bench: Workbench, desk: Desk, state: State, instruction: Instruction, request: str
) -> Trained:
    """Train the current adapter as the phase wants it, on the client's share of the task, or of all
    tasks that are to be learnt at once; as the privacy mechanism allows it.

    Args:
        request: a name for the request, to answer it twice with the same.

    Raises:
        Refusal: the client has no data for it, no budget, or a policy against it.
    """
    config, phase = bench.experiment, bench.phase(instruction.phase)
    require_policy(config, desk.site)
    check_training(instruction, bench, desk.site.policy)
    seen = _spaces(bench, instruction.seen)
    ahead = partial(_spaces, bench, instruction.ahead)
    data = _data(bench, desk.client, instruction.task, phase, seen)
    together = [_share(bench, task, desk.client) for task in instruction.tasks]
    where = instruction.stage, instruction.server_round
    ask = Ask(
        request=f"{instruction.phase} {request}",
        client=str(desk.client),
        task=instruction.task,
        phase=instruction.phase,
        stage=instruction.stage,
        server_round=instruction.server_round,
        data=[e for share in together for e in share.data] if together else data.train,
        record_ids=data.record_ids,
        records=lambda: bench.records(desk.client),
        site_records=lambda: bench.site_records(desk.client),
        ids=lambda: bench.ids(instruction.task, desk.client),
        learning_rate=phase.learning_rate or config.train.learning_rate,
        generator=seeded(config.run.seed, "train", desk.client, *where),
    )

    def make(gradients: Gradients) -> Trained:
        task = LocalTask(data.labels, seen, *_kept(bench, desk, instruction), together, ahead)
        memory = data.memory if phase.public_path else bench.learning(desk.client, instruction.task)
        return _trained(bench, desk, state, instruction, task, memory, gradients)

    return _mechanism(bench, phase).release(ask, desk.site, make)


def _mechanism(bench: Workbench, phase: Phase) -> Mechanism:
    """By whose data are read: public texts are nobody's, all else is protected as the experiment
    says (:func:`_data` reads the one or the other)."""
    return PublicTexts(bench.experiment) if phase.public_path else bench.mechanism


def _spaces(bench: Workbench, tasks: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Public label spaces."""
    return tuple(bench.labels(task) for task in tasks)


def _kept(bench: Workbench, desk: Desk, instruction: Instruction) -> tuple[Past | None, RoundStore]:
    """What the client has of earlier tasks, and of earlier rounds."""
    folder = desk.store.folder
    public = bench.phase(instruction.phase).public_path
    protected = public or bench.mechanism.unit is not None
    past_tasks = () if protected else instruction.past  # whose records no charge would name
    shares = [partial(_share, bench, task, desk.client) for task in past_tasks]
    known = sum(1 for _ in takewhile(set(instruction.seen).__contains__, past_tasks))
    past = Past(shares, TaskStore(folder), known) if shares else None
    return past, RoundStore(folder, instruction.stage, instruction.server_round)


def _trained(
    bench: Workbench,
    desk: Desk,
    state: State,
    instruction: Instruction,
    task: LocalTask,
    memory: Memory,
    gradients: Gradients,
) -> Trained:
    """The one local training, and its update as it travels; the mechanism says with ``gradients``
    which data are read."""
    started = time.monotonic()
    config, phase = bench.experiment, bench.phase(instruction.phase)
    trained, probes = frozenset(instruction.trained), bench.probes(tuple(task.labels))
    load_state(bench.model, state)
    _rehearse(bench, state, phase, task, trained, gradients)
    rate = phase.learning_rate or config.train.learning_rate
    report = descend(
        bench.model,
        phase.objective(bench.model, state, task, gradients.data, memory),
        gradients,
        trained,
        config.train.model_copy(update={"learning_rate": rate}),
    )
    gradients.finished(bench.model, task.labels, probes)
    adapter = read(bench.model.module)
    encoded = _encode(bench, desk.client, adapter, state.current, instruction, desk.store)
    figures = {
        "num_examples": len(gradients.data),
        "loss": report.loss,
        "seconds": time.monotonic() - started,
    }
    return Trained(encoded, figures)


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
    alone = replace(task, past=None, carried=None)
    set_trainable(bench.model.module, trained)
    objective = phase.objective(bench.model, state, alone, probes, Memory())
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


def _data(
    bench: Workbench, client: int, task: str, phase: Phase, seen: tuple[tuple[str, ...], ...]
) -> ClientTask:
    """The client's share of the task, or the public texts under all labels so far."""
    if not phase.public_path:
        return bench.task(task, client)
    return bench.public(phase.public_path, merged((*seen, bench.labels(task))))


def _share(bench: Workbench, task: str, client: int) -> Share:
    """The client's own training data of a task; of an earlier one, read when a method asks."""
    data = bench.task(task, client)
    return Share(data.labels, data.train)


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
    bench: Workbench, desk: Desk, state: State, instruction: Instruction, request: str
) -> Counts:
    """Return ``correct`` and ``examples`` on the client's test share of every task asked for, as
    the privacy mechanism lets them go.

    Raises:
        Refusal: they do not leave the site.
    """
    check_tasks(instruction, bench)

    def make() -> Counts:
        shares = [bench.task(task, desk.client) for task in instruction.tasks]
        return {
            "correct": [_correct(bench, share, state) for share in shares],
            "examples": [len(share.test) for share in shares],
        }

    ask = Ask(
        request=f"evaluate {request}",
        client=str(desk.client),
        task="",
        phase="evaluate",
        stage=instruction.stage,
        server_round=instruction.server_round,
        data=(),
        record_ids=(),
        records=lambda: bench.records(desk.client),
        site_records=lambda: bench.site_records(desk.client),
        ids=lambda: (),
        learning_rate=0.0,
        generator=seeded(bench.experiment.run.seed, "evaluate", desk.client, instruction.stage),
        evaluated=len(instruction.tasks),
    )
    return bench.mechanism.count(ask, desk.site, make)


def _correct(bench: Workbench, share: ClientTask, state: State) -> int:
    """Right answers; not counted again while the model is what it was."""

    def count() -> int:
        load_state(bench.model, state)
        return count_correct(bench.model, share.test, share.labels)

    correct: int = share.memory.once("correct", state, count) if share.test else 0
    return correct
