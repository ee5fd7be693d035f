"""A request for an update, and the answer, without Flower: what the client makes of the records
that its privacy mechanism lets it read."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.gate import Authorization, require
from client.identity import ClientRequest
from client.runtime import ClientRuntime, ClientTask
from client.state import RoundStore, TaskStore, sums_once
from deal_core.data import public_texts, texts_digest
from deal_core.deal import interface
from deal_core.deal.objective import under_all_labels
from deal_core.lora.attach import read
from deal_core.lora.state import learnt_shapes
from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.interface import LocalUpdate, RecordId, UpdateRequest
from deal_core.privacy.policy import BudgetSpent, OutsidePlan, Policy
from deal_core.randomness import seeded
from deal_core.training import loop
from deal_core.wire.instruction import Instruction
from deal_core.wire.secure_layout import CLASS_SUMS, EXAMPLES
from deal_core.wire.tensors import BOTH, EXACT, WireArrays, pack_update, selected


def local_update(
    granted: ClientRequest, authorization: Authorization, sites: int = 0
) -> LocalUpdate:
    """Train the current adapter as the phase wants it, on the client's share of the task, or of all
    tasks that are to be learnt at once; as the privacy mechanism allows it.

    Args:
        granted: task, phase and factors to train.
        authorization: of the gate, for it.
        sites: in the secure sum that the update goes into; 0: into none.

    Returns:
        What may leave: the trained factors, or the sums that the phase is made of.

    Raises:
        Refusal: the client has no data for it, no budget, or it is not what the run has planned.
    """  # noqa: DOC501 (what the ledger says becomes a Refusal)
    runtime, instruction, number = granted.runtime, granted.instruction, granted.client.number
    data = runtime.task(instruction.task, number)
    joint_tasks = [own_share(runtime, number, task) for task in instruction.tasks]
    if granted.phase.statistics is not None:
        joint_tasks = worked_on(runtime, instruction, joint_tasks, granted.client.policy)
    elif runtime.experiment.stream.schedule == "joint-all-labels":
        joint_tasks = under_all_labels(joint_tasks)
    training = LocalTraining(granted, data, joint_tasks)
    ask = training.request(sites)
    authorization.require("records", records=len(ask.data))
    try:
        train = partial(training.update, ask.data)
        update = authorization.mechanism.update(ask, granted.client.site, train)
    except (BudgetSpent, OutsidePlan) as fault:
        authorization.require("release", fault=fault)
        raise
    for write in training.unsaved:
        write()
    return update


def own_share(runtime: ClientRuntime, client: int, task: str) -> interface.TaskDataset:
    """Return the client's own training data of a task."""
    data = runtime.task(task, client)
    return interface.TaskDataset(data.labels, data.train)


@dataclass(frozen=True)
class LocalTraining:
    """What a request is answered from."""

    granted: ClientRequest
    data: ClientTask
    """The client's share of the task."""
    joint_tasks: Sequence[interface.TaskDataset]
    """Its shares of all tasks that are learnt at once; none: of one alone."""
    unsaved: list[Callable[[], None]] = field(default_factory=list)
    """Writes what the client carries to later rounds. It follows from what was read, so that
    nothing of it may last before the update is charged."""

    def request(self, sites: int) -> UpdateRequest:
        """Return what the privacy mechanism must know of the training; ``sites``: in the sum."""
        granted, statistics = self.granted, self.granted.phase.statistics
        runtime, instruction, client = granted.runtime, granted.instruction, granted.client.number
        together = list(zip(instruction.tasks, self.joint_tasks, strict=True))
        data, record_ids = self.data.train, self.data.record_ids
        if together:
            data = [each for _, share in together for each in share.data]
            record_ids = [
                RecordId(task, row) for task, share in together for row in range(len(share.data))
            ]
        if statistics is None:
            learnt = learnt_shapes(granted.state.current, frozenset(instruction.trained))
            entries = sum(map(math.prod, learnt.values()))
        else:
            classes = statistics.classes(runtime.labels(instruction.task))
            shapes = statistics.shapes(classes, runtime.experiment.model)
            entries = sum(math.prod(shape) for shape in shapes.values())
        exact = statistics is not None and statistics.exact is not None
        return UpdateRequest(
            request=f"{instruction.phase} {granted.name}",
            client=str(client),
            task=instruction.task,
            phase=instruction.phase,
            stage=instruction.stage,
            server_round=instruction.server_round,
            data=data,
            record_ids=record_ids,
            groups=self.data.train_groups if runtime.grouped else None,
            units=lambda: runtime.units(client),
            site_units=lambda: runtime.site_units(client),
            ids=lambda: runtime.ids(instruction.task, client),
            entries=entries,
            sites=sites,
            sums_noise=None if exact or statistics is None else statistics.noise_multiplier,
            joint_tasks=tuple(task for task, share in together if share.data),
        )

    def update(
        self, data: Sequence[Encoded], gradients: PrivateGradients | NoisySum | None
    ) -> LocalUpdate:
        """Return the update as it travels: trained factors, or the sums that the phase is made of;
        ``gradients`` says which of the ``data`` are read, and what is done to them; None: all, and
        nothing."""
        granted, statistics, tasks = self.granted, self.granted.phase.statistics, self.joint_tasks
        runtime, instruction = granted.runtime, granted.instruction
        if statistics is not None and statistics.exact is not None:
            own = tasks or [interface.TaskDataset(self.data.labels, self.data.train)]
            return exact_sums(granted, statistics, own)
        if statistics is not None:
            assert isinstance(gradients, NoisySum)
            return class_sums(granted, statistics, gradients, tasks)
        started, trained = time.monotonic(), frozenset(instruction.trained)
        objective, client = granted.phase.objective, str(granted.client.number)
        data = data if gradients is None else gradients.data
        task = self._task(data)
        loop.load_state(runtime.model, granted.state)
        if gradients is not None:
            runtime.rehearse_gradients(objective, task, trained, gradients)
        made = objective(task)
        if isinstance(gradients, NoisySum):
            groups = set(self.data.train_groups) if runtime.grouped else self.data.train
            units = len(groups)
            expected = np.array([max(1, round(gradients.sample_rate * units))], np.int64)
            total = {**gradients.total(runtime.model.module, made), EXAMPLES: expected}
            return LocalUpdate(total, {"num_examples": 1.0, "seconds": time.monotonic() - started})
        config = runtime.experiment
        seed = config.run.seed, "train", client, instruction.stage, instruction.server_round
        steps: loop.Gradients | None = gradients
        if steps is None:
            epochs = config.federation.local_epochs
            steps = loop.NonPrivateGradients(data, epochs, config.train, seeded(*seed))
        take = runtime.take_steps if gradients is None else loop.run_local_steps
        report = take(runtime.model, made, steps, trained, config.train)
        if gradients is not None:
            probes = runtime.probes(tuple(task.labels), task.instruction)
            gradients.finished(runtime.model, task.labels, probes)
        encoded, seconds = self._encoded(trained), time.monotonic() - started
        figures = {"num_examples": len(data), "loss": report.loss, "seconds": seconds}
        return LocalUpdate(encoded, figures)

    def _task(self, data: Sequence[Encoded]) -> interface.LocalTask:
        """What the client knows of the task, of earlier tasks, and of earlier rounds."""
        runtime, instruction, client = (
            self.granted.runtime,
            self.granted.instruction,
            self.granted.client,
        )
        folder, protected = client.kept, runtime.mechanism.unit is not None
        past_tasks = () if protected else instruction.past  # whose records no charge would name
        shares = [partial(own_share, runtime, client.number, task) for task in past_tasks]
        met = {*instruction.seen, instruction.task}  # a task that returns was met before
        known = sum(1 for _ in takewhile(met.__contains__, past_tasks))
        store = RoundStore(folder, instruction.stage, instruction.server_round)
        seen = tuple(map(runtime.labels, instruction.seen))
        asks = map(runtime.instruction, instruction.seen)
        return interface.LocalTask(
            model=runtime.model,
            state=self.granted.state,
            data=data,
            labels=self.data.labels,
            seen=seen,
            past=interface.TaskHistory(shares, TaskStore(folder), known) if shares else None,
            round_state=SavedLater(store, self.unsaved),
            joint_tasks=self.joint_tasks,
            future=lambda: list(map(runtime.labels, instruction.future)),
            prompts=[interface.TaskPrompt(*each) for each in zip(seen, asks, strict=True)],
            protected=protected,
            instruction=runtime.instruction(instruction.task),
            cache=runtime.learning.get_or_compute(str(client.number), instruction.task, loop.Cache),
        )

    def _encoded(self, trained: frozenset[str]) -> WireArrays:
        """Pack the update; keep what a lossy format lost for the client's next round."""
        instruction, before = self.granted.instruction, self.granted.state.current
        where = (instruction.stage, instruction.server_round)
        client, config = self.granted.client, self.granted.runtime.experiment
        dtype, lossy = config.wire.dtype, config.wire.dtype != EXACT
        store = RoundStore(client.kept, *where, "feedback")
        basis = f"{instruction.phase} {_digest(selected(before, BOTH - trained))}" if lossy else ""
        generator = seeded(config.run.seed, "uplink", client.number, *where)
        kept = store.load(basis) if lossy else {}
        feedback = {key: value.numpy() for key, value in kept.items()}
        adapter = read(self.granted.runtime.model.module)
        encoded, lost = pack_update(adapter, before, dtype, trained, feedback, generator)
        if lossy:
            tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in lost.items()}
            self.unsaved.append(partial(store.save, basis, tensors))
        return encoded


def _digest(arrays: Mapping[str, NDArray[np.float32]]) -> str:
    """A name for these values; equal values have equal names."""
    hashed = hashlib.sha256()
    for key in sorted(arrays):
        hashed.update(key.encode())
        hashed.update(np.ascontiguousarray(arrays[key]).tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True)
class SavedLater:
    """What a method carries from round to round, written when the update has been charged."""

    store: RoundStore
    unsaved: list[Callable[[], None]]

    def load(self, basis: str) -> interface.Tensors:
        """Return what the latest round before this one left."""
        return self.store.load(basis)

    def save(self, basis: str, tensors: interface.Tensors) -> None:
        """Leave this for a later round."""
        self.unsaved.append(partial(self.store.save, basis, tensors))


def worked_on(
    runtime: ClientRuntime,
    instruction: Instruction,
    tasks: Sequence[interface.TaskDataset],
    policy: Policy | None,
) -> list[interface.TaskDataset]:
    """Return the tasks whose records are added up, with no record of those that the client has not
    worked on, or has fewer of than the policy lets go: each of several has sums of its own."""
    least = policy.min_records if policy is not None else 0
    own = {instruction.task, *instruction.past}
    if runtime.experiment.stream.at_once:
        own |= set(instruction.tasks)
    return [
        each if name in own and len(each.data) >= least else interface.TaskDataset(each.labels, [])
        for name, each in zip(instruction.tasks, tasks, strict=True)
    ]


def class_sums(
    granted: ClientRequest,
    statistics: interface.Statistics,
    gradients: NoisySum,
    tasks: Sequence[interface.TaskDataset],
) -> LocalUpdate:
    """Return class sums over the client's records of every task that it is asked about, with its
    share of the noise. A site without a mechanism gives what it gave before (:func:`sums_once`).

    ``tasks``: of several the records, which are those of ``gradients`` in this order.

    Raises:
        Refusal: it gave another form of them before, or with less noise.
    """
    runtime, client = granted.runtime, granted.client
    started, size = time.monotonic(), statistics.size(runtime.experiment.model)
    found: dict[str, NDArray[Any]] = {}
    records, first = [len(each.data) for each in tasks] or [len(gradients.data)], 0
    for place, task in enumerate(granted.instruction.tasks or (granted.instruction.task,)):
        labels, data = runtime.labels(task), gradients.data[first : first + records[place]]
        runtime.rehearse_embeddings(task, statistics.layers)
        vectors, share = torch.zeros(0, size), runtime.task(task, client.number)
        if data:
            vectors = runtime.vectors(share, "train", statistics)
        targets = torch.tensor([max(0, item.target) for item in data], dtype=torch.long)
        add = partial(gradients.class_sums, vectors, targets, statistics.classes(labels), first)
        first += len(data)
        name = f"{place}.{CLASS_SUMS}"
        if client.file is None or runtime.mechanism.unit is not None or not data:
            found[name] = add()
            continue
        form = _form(runtime, statistics, labels), gradients.shares
        sums, given = sums_once(Path(client.file.site.state) / "sums", task, form, add)
        require(granted.asked(task=task, given=given, wanted=form), "given sums")
        found[name] = sums
    return LocalUpdate(found, {"num_examples": 1.0, "seconds": time.monotonic() - started})


def _form(runtime: ClientRuntime, statistics: interface.Statistics, labels: Sequence[str]) -> str:
    """Return all that decides how records of a task are added up, but the records."""
    config = runtime.experiment
    texts = public_texts(config.data, list(map(runtime.labels, runtime.tasks)))
    vectors = config.model.name, statistics.layers, statistics.directions, texts_digest(texts)
    noise = statistics.noise_multiplier, config.privacy.max_grad_norm
    return repr((*vectors, *noise, tuple(labels)))


def exact_sums(
    granted: ClientRequest, statistics: interface.Statistics, tasks: Sequence[interface.TaskDataset]
) -> LocalUpdate:
    """Return sums of another kind over the client's records of every task that it is asked for."""
    started, runtime, instruction = time.monotonic(), granted.runtime, granted.instruction
    assert statistics.exact is not None
    nothing = torch.zeros(0, statistics.size(runtime.experiment.model))
    found: dict[str, NDArray[Any]] = {}
    for place, task in enumerate(instruction.tasks or (instruction.task,)):
        own, share = tasks[place], runtime.task(task, granted.client.number)
        vectors = runtime.vectors(share, "train", statistics) if own.data else nothing
        targets = torch.tensor([item.target for item in own.data], dtype=torch.long)
        embedded = interface.EmbeddedTask(
            vectors, targets, len(own.labels), granted.state.heads.get(task)
        )
        sums = statistics.exact.collect(embedded)
        found |= {f"{place}.{name}": value.numpy() for name, value in sums.items()}
    examples = sum(len(own.data) for own in tasks)
    return LocalUpdate(found, {"num_examples": examples, "seconds": time.monotonic() - started})
