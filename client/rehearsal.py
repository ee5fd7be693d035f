"""What a client whose records are protected tries out on constant texts before it reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from client.runtime import ClientRuntime
from deal_core.deal.distillation import CACHED_FLOATS
from deal_core.lora.attach import at_task_start, set_trainable
from deal_core.methods import LocalTask
from deal_core.models import Encoded, GeneratingModel
from deal_core.privacy.interface import Gradients, GradientSum, rehearsing
from deal_core.training.batching import Cache
from deal_core.training.evaluation import base_embeddings, count_correct
from deal_core.training.loop import Objective

ObjectiveOf = Callable[[LocalTask, Sequence[Encoded], Cache], Objective]


def rehearse(
    runtime: ClientRuntime,
    objective: ObjectiveOf,
    task: LocalTask,
    trained: frozenset[str],
    gradients: Gradients | GradientSum,
) -> None:
    """Let the mechanism try its gradients out on constant texts: what cannot work fails here, and
    no record has to do with it. One of them is as long as a text may be, under the prompt of the
    task and of each earlier one, and each text has a pass of its own: where the machine has too
    little memory, it dies here.

    Args:
        runtime: its model holds the adapters of the round.
        objective: what is differentiated, over some data of a task.
        task: what the client knows of the task.
        trained: factors that learn, from now on.
        gradients: of the mechanism.

    Raises:
        RehearsalFailed: it does not work.
    """
    module = runtime.model.module
    with rehearsing(), room_for_answers(runtime.model.device):
        labels = tuple(task.labels)
        longest = runtime.longest(labels, task.instruction)
        probes = [*runtime.probes(labels, task.instruction), *longest]
        alone = replace(task, past=None, round_state=None)
        set_trainable(module, trained)
        gradients.rehearse(module, objective(alone, probes, Cache()), len(probes))
        asked = () if runtime.model.has_label_logits else task.prompts
        for prompt in asked:  # a text is asked about under one of them, whichever it is
            under = replace(alone, seen=(prompt.labels,), prompts=(prompt,))
            gradients.rehearse(module, objective(under, longest, Cache()), len(longest))
            if prompt.labels or not isinstance(runtime.model, GeneratingModel):
                continue
            texts = runtime.longest((), prompt.instruction)
            # The teacher's answer to a constant text may be short, and to a record as long as this.
            with at_task_start(module):
                runtime.model.written(texts, to_the_end=True)
            writing = replace(under, labels=(), instruction=prompt.instruction)
            gradients.rehearse(module, objective(writing, texts, Cache()), len(texts))


@contextmanager
def room_for_answers(device: torch.device) -> Iterator[None]:
    """Hold as much memory as a teacher's answers about the records may take at most."""
    held = torch.ones(CACHED_FLOATS, device=device)
    yield
    del held


def rehearse_embeddings(
    runtime: ClientRuntime, labels: tuple[str, ...], instruction: str, layers: int
) -> None:
    """Embed the longest text that there may be, before the records of a task are.

    Args:
        runtime: its model.
        labels: of the task.
        instruction: of the task: as its records are read.
        layers: of how many of the last layers.

    Raises:
        RehearsalFailed: it does not work.
    """
    with rehearsing():
        base_embeddings(runtime.model, runtime.longest(labels, instruction), layers)


def rehearse_answers(runtime: ClientRuntime, labels: tuple[str, ...], instruction: str) -> None:
    """Answer the longest text that there may be, before the test records of a task are; the model
    holds the adapters of the round.

    Args:
        runtime: its model.
        labels: of the task.
        instruction: of the task.

    Raises:
        RehearsalFailed: it does not work.
    """
    with rehearsing():
        longest = runtime.longest(labels, instruction)
        count_correct(runtime.model, longest, labels)
        if not labels and isinstance(runtime.model, GeneratingModel):
            runtime.model.written(longest, to_the_end=True)
