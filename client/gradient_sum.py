"""The gradient sum of a client's records: the server takes a step on the sum over sites."""

from __future__ import annotations

import time

import numpy as np

from client.rehearsal import ObjectiveOf, rehearse
from client.resources import Workbench
from deal_core.lora.state import State
from deal_core.methods import LocalTask
from deal_core.privacy.interface import GradientSum, LocalUpdate
from deal_core.training.cache import Cache
from deal_core.training.loop import load_state
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
