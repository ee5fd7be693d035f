"""One local training, or one sum, of a request: what the client makes of the records that its
privacy mechanism lets it read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile

import numpy as np

from client.client_context import ClientContext
from client.local_sums import class_sums, exact_sums
from client.rehearsal import ObjectiveOf, rehearse
from client.resources import ClientTask, Workbench
from client.state import RoundStore, TaskStore, digest
from deal_core.lora.adapter import Adapter
from deal_core.lora.attach import read
from deal_core.lora.state import State
from deal_core.methods import LocalTask, Phase, RoundState, TaskDataset, TaskHistory, Tensors
from deal_core.privacy.interface import GradientSum, LocalUpdate
from deal_core.randomness import seeded
from deal_core.training.batching import Cache
from deal_core.training.loop import Gradients, load_state, run_local_steps
from deal_core.wire.adapter_record import EXACT, frozen_factors, pack_update
from deal_core.wire.codec import WireArrays
from deal_core.wire.instruction import Instruction
from deal_core.wire.secure_layout import EXAMPLES


def gradient_sum(
    bench: Workbench,
    state: State,
    objective: ObjectiveOf,
    task: LocalTask,
    trained: frozenset[str],
    gradients: GradientSum,
    examples: int,
    cache: Cache,
) -> LocalUpdate:
    """Return the noisy sum of clipped gradients, whole numbers by key of a factor, and how many
    examples it is over on average; nothing is trained.

    Args:
        bench: model and settings.
        state: the adapters as they arrived.
        objective: what is differentiated, over some data of a task.
        task: what the client knows of the task.
        trained: factors that learn.
        gradients: say which data are read, and add the noise.
        examples: of the client, which count as public.
        cache: of what the client works out while it learns the task.
    """
    started, module = time.monotonic(), bench.model.module
    load_state(bench.model, state)
    rehearse(bench, objective, task, trained, gradients)
    total = gradients.total(module, objective(task, gradients.data, cache))
    expected = np.array([max(1, round(gradients.sample_rate * examples))], np.int64)
    figures = {"num_examples": 1.0, "seconds": time.monotonic() - started}
    return LocalUpdate({**total, EXAMPLES: expected}, figures)


@dataclass(frozen=True)
class LocalTraining:
    """What a request is answered from.

    Attributes:
        bench: model, method and tokenised data of this process.
        client_context: whose data they are.
        state: the adapters as they arrived.
        instruction: task, phase and factors to train.
        data: the client's share of the task.
        joint_tasks: its shares of all tasks that are learnt at once; none: of one alone.
        units: records, or groups, of the share.
        unsaved: writes what the client carries to later rounds. It follows from what was read, so
            that nothing of it may last before the update is charged: see :meth:`save`.
    """

    bench: Workbench
    client_context: ClientContext
    state: State
    instruction: Instruction
    data: ClientTask
    joint_tasks: Sequence[TaskDataset]
    units: int
    unsaved: list[Callable[[], None]] = field(default_factory=list)

    def save(self) -> None:
        """Write what is carried to later rounds; the update has been charged."""
        for write in self.unsaved:
            write()

    def update(self, gradients: Gradients | GradientSum) -> LocalUpdate:
        """Return the update as it travels: trained factors, or the sums that the phase is made of;
        ``gradients`` says which data are read, and what is done to them."""
        bench, state, instruction = self.bench, self.state, self.instruction
        client, statistics = self.client_context.client, self._phase.statistics
        if statistics is not None and statistics.exact is not None:
            own = self.joint_tasks or [TaskDataset(self.data.labels, self.data.train)]
            return exact_sums(bench, client, state, instruction, statistics, own)
        if statistics is not None:
            assert isinstance(gradients, GradientSum)
            tasks = self.joint_tasks
            given = self.client_context.given if bench.mechanism.unit is None else None
            return class_sums(bench, client, instruction, statistics, gradients, tasks, given)
        if isinstance(gradients, GradientSum):
            objective, task, trained = self._objective, self._task(), self._trained
            return gradient_sum(
                bench, state, objective, task, trained, gradients, self.units, self._cache
            )
        return self._learnt(self._task(), gradients)

    @property
    def _phase(self) -> Phase:
        return self.bench.phase(self.instruction.phase)

    @property
    def _objective(self) -> ObjectiveOf:
        return partial(self._phase.objective, self.bench.model, self.state)

    @property
    def _trained(self) -> frozenset[str]:
        return frozenset(self.instruction.trained)

    @property
    def _cache(self) -> Cache:
        return self.bench.learning(self.client_context.client, self.instruction.task)

    def _task(self) -> LocalTask:
        bench, instruction = self.bench, self.instruction
        past, round_state = self._kept()
        return LocalTask(
            labels=self.data.labels,
            seen=bench.spaces(instruction.seen),
            past=past,
            round_state=round_state,
            joint_tasks=self.joint_tasks,
            future=partial(bench.spaces, instruction.future),
            prompts=[bench.prompt(task) for task in instruction.seen],
            protected=bench.mechanism.unit is not None,
            instruction=bench.instruction(instruction.task),
        )

    def _kept(self) -> tuple[TaskHistory | None, RoundState]:
        """What the client has of earlier tasks, and of earlier rounds."""
        instruction, folder = self.instruction, self.client_context.store.folder
        protected = self.bench.mechanism.unit is not None
        past_tasks = () if protected else instruction.past  # whose records no charge would name
        own = partial(own_share, self.bench, self.client_context.client)
        shares = [partial(own, task) for task in past_tasks]
        met = {*instruction.seen, instruction.task}  # a task that returns was met before
        known = sum(1 for _ in takewhile(met.__contains__, past_tasks))
        past = TaskHistory(shares, TaskStore(folder), known) if shares else None
        store = RoundStore(folder, instruction.stage, instruction.server_round)
        return past, SavedLater(store, self.unsaved)

    def _learnt(self, task: LocalTask, gradients: Gradients) -> LocalUpdate:
        """The update of local steps."""
        started, bench = time.monotonic(), self.bench
        config = bench.experiment.train
        probes = bench.probes(tuple(task.labels), task.instruction)
        load_state(bench.model, self.state)
        if bench.mechanism.unit is not None:
            rehearse(bench, self._objective, task, self._trained, gradients)
        report = run_local_steps(
            bench.model,
            self._objective(task, gradients.data, self._cache),
            gradients,
            self._trained,
            config,
        )
        gradients.finished(bench.model, task.labels, probes)
        encoded = self._encoded(read(bench.model.module))
        figures = {
            "num_examples": len(gradients.data),
            "loss": report.loss,
            "seconds": time.monotonic() - started,
        }
        return LocalUpdate(encoded, figures)

    def _encoded(self, adapter: Adapter) -> WireArrays:
        """Pack the update; keep what a lossy format lost for the client's next round."""
        instruction, store = self.instruction, self.client_context.store
        where, before = (instruction.stage, instruction.server_round), self.state.current
        config = self.bench.experiment
        basis = f"{instruction.phase} {digest(frozen_factors(before, self._trained))}"
        generator = seeded(config.run.seed, "uplink", self.client_context.client, *where)
        dtype = config.wire.dtype
        feedback = store.load(*where, basis) if dtype != EXACT else {}
        encoded, lost = pack_update(adapter, before, dtype, self._trained, feedback, generator)
        if dtype != EXACT:
            self.unsaved.append(partial(store.save, *where, basis, lost))
        return encoded


@dataclass(frozen=True)
class SavedLater:
    """What a method carries from round to round, written when the update has been charged."""

    store: RoundStore
    unsaved: list[Callable[[], None]]

    def load(self, basis: str) -> Tensors:
        """Return what the latest round before this one left."""
        return self.store.load(basis)

    def save(self, basis: str, tensors: Tensors) -> None:
        """Leave this for a later round."""
        self.unsaved.append(partial(self.store.save, basis, tensors))


def own_share(bench: Workbench, client: int, task: str) -> TaskDataset:
    """Return the client's own training data of a task; of an earlier one, read when a method
    asks."""
    data = bench.task(task, client)
    return TaskDataset(data.labels, data.train)
