"""One request, one answer, without Flower: what a client computes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

from client.state import FeedbackStore, RoundStore, TaskStore, digest
from client.workbench import ClientTask, Workbench
from deal_core.adapters import Adapter
from deal_core.attach import read
from deal_core.codec import Encoded
from deal_core.instruction import Instruction
from deal_core.methods import LocalTask, Past, Phase, Share, State
from deal_core.randomness import seeded
from deal_core.record import EXACT, frozen_factors, pack_update
from deal_core.training import count_correct, load_state, train


@dataclass(frozen=True)
class Update:
    """What one local update gives: what travels, and its figures."""

    encoded: Encoded
    num_examples: int
    loss: float
    seconds: float


def local_update(
    bench: Workbench, client: int, state: State, instruction: Instruction, store: FeedbackStore
) -> Update | None:
    """Train the current adapter as the phase wants it, on the client's share of the task, or of all
    tasks that are to be learnt at once; None: there is no data for it here."""
    started = time.monotonic()
    config, phase = bench.experiment, bench.phase(instruction.phase)
    seen = tuple(dict.fromkeys(x for task in instruction.seen for x in bench.labels(task)))
    data = _data(bench, client, instruction.task, phase, seen)
    together = [_share(bench, task, client) for task in instruction.tasks]
    examples = [e for share in together for e in share.data] if together else data.train
    if not examples:
        return None
    load_state(bench.model, state)
    generator = seeded(
        config.run.seed, "train", client, instruction.stage, instruction.server_round
    )
    shares = [partial(_share, bench, task, client) for task in instruction.past]
    known = sum(1 for _ in takewhile(set(instruction.seen).__contains__, instruction.past))
    past = Past(shares, TaskStore(store.folder), known) if shares else None
    carried = RoundStore(store.folder, instruction.stage, instruction.server_round)
    task = LocalTask(data.labels, seen, past, carried, together)
    rate = phase.learning_rate or config.train.learning_rate
    report = train(
        bench.model,
        phase.objective(bench.model, state, task, examples, data.memory),
        examples,
        frozenset(instruction.trained),
        config.federation.local_epochs,
        config.train.model_copy(update={"learning_rate": rate}),
        generator,
    )
    adapter = read(bench.model.module)
    encoded = _encode(bench, client, adapter, state.current, instruction, store)
    return Update(encoded, len(examples), report.loss, time.monotonic() - started)


def _data(
    bench: Workbench, client: int, task: str, phase: Phase, seen: tuple[str, ...]
) -> ClientTask:
    """The client's share of the task, or the public texts under all labels so far."""
    if not phase.public_path:
        return bench.task(task, client)
    return bench.public(phase.public_path, tuple(dict.fromkeys((*seen, *bench.labels(task)))))


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
    bench: Workbench, client: int, state: State, instruction: Instruction
) -> dict[str, list[int]]:
    """Return ``correct`` and ``examples`` on the client's test share of every task asked for."""
    shares = [bench.task(task, client) for task in instruction.tasks]
    return {
        "correct": [_correct(bench, share, state) for share in shares],
        "examples": [len(share.test) for share in shares],
    }


def _correct(bench: Workbench, share: ClientTask, state: State) -> int:
    """Right answers; not counted again while the model is what it was."""

    def count() -> int:
        load_state(bench.model, state)
        return count_correct(bench.model, share.test, share.labels)

    correct: int = share.memory.once("correct", state, count) if share.test else 0
    return correct
