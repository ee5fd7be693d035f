"""What a run asks of the machine: memory of a process, and time of a client's training.

Memory is the program's own, the frozen weights, and what a training pass keeps for its backward:
about 22 numbers a token, layer and unit of width. Arithmetic is two operations a weight and token
forward, and two backward through the layers from the first adapted one on; a generative model's
layers below see a text once. The time is that arithmetic at the rate of one large product, measured
here: a step reaches about three quarters of it (docs/scaling.md).
"""

import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import transformers

from deal_core.config.experiment import Experiment
from deal_core.data import TaskData, open_source
from deal_core.models import has_label_logits, loading, skeleton
from deal_core.training.hardware import compute_dtype, threads
from deal_core.training.loop import TOKENS
from simulations.engines.worker_pool import this_machine
from simulations.output import duration, size
from simulations.run.data_checks import looked_at, token_counts
from simulations.run.quick_checks import Finding, warning

PROGRAM_BYTES = 0.95e9
"""Of Python, torch, transformers and the run's own data (measured)."""
KEPT = 22.5
"""Numbers that a training pass keeps a token, layer and unit of width (measured)."""
REACHED = 0.75
"""Of the rate of a large product, by a training step (measured)."""
PRODUCT = (512, 2048, 4096)
"""Rows, width and columns of the product that is timed."""


def check_needs(experiment: Experiment) -> Iterator[Finding]:
    """Yield a note of memory and time, and a warning where the memory is not there."""
    device = loading.best_device()
    dtype = compute_dtype(experiment.train, device, experiment.privacy.mechanism != "none")
    base = skeleton(experiment.model)
    weights, training = memory_of(experiment, base, dtype)
    needed = PROGRAM_BYTES + weights + training
    workers, work = this_machine(experiment), training_work(experiment, base)
    with threads(workers.threads):
        seconds = work / (REACHED * product_rate(device, dtype))
    where = f"{workers.threads} of this machine's processor threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    yield Finding(
        f"memory of a process about {size(needed)}: {size(weights)} of weights in "
        f"{str(dtype).removeprefix('torch.')}, {size(training)} for a training pass; processes: "
        f"{workers.count}; training of a client and round about {work / 1e12:.1f} TFLOP, at least "
        f"{duration(max(1.0, seconds))} on {where}",
        kind="note",
    )
    free = free_bytes(device)
    if needed * workers.count > free:
        yield warning(
            f"run.workers: {workers.count} processes need about {size(needed * workers.count)} of "
            f"memory, and {size(free)} are free; lower run.workers, train.batch_size or "
            "train.max_length, or choose model.bits = 4 or a smaller model"
        )


def memory_of(experiment: Experiment, base: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return bytes of the frozen weights, and of what a training pass keeps."""
    bits = experiment.model.bits
    weights = base.num_parameters() * (bits / 8 if bits else dtype.itemsize)
    longest = experiment.train.max_length
    if not has_label_logits(experiment.model):
        longest += experiment.model.max_new_tokens
    tokens = min(TOKENS, experiment.train.batch_size * longest)
    width = base.config.get_text_config().hidden_size
    layers = base.config.get_text_config().num_hidden_layers - experiment.adapter.first_layer
    return float(weights), KEPT * dtype.itemsize * tokens * layers * width


def training_work(experiment: Experiment, base: Any) -> float:
    """Return operations of one client's training in a round, of the mean client and task."""
    source = open_source(experiment.data)
    names = source.task_names()
    tokenizer = loading.pretrained(transformers.AutoTokenizer, experiment.model.name)
    tokens = sum(_tokens_of(experiment, tokenizer, source.load(name)) for name in names)
    embedding = base.get_input_embeddings().weight.numel()
    layers = base.config.get_text_config().num_hidden_layers
    generative, first = not has_label_logits(experiment.model), experiment.adapter.first_layer
    adapted = 1 - first / layers
    weights = base.num_parameters() - embedding
    passes = 4 * adapted + (0 if generative else 2 * (1 - adapted))
    each_round = tokens / len(names) / experiment.federation.clients * weights * passes
    return float(each_round * experiment.federation.local_epochs)


def _tokens_of(experiment: Experiment, tokenizer: Any, task: TaskData) -> float:
    """Of a task's training texts, and of their answers where a model learns to write them."""
    model, examples = experiment.model, looked_at(task)
    counts = token_counts(tokenizer, [example.text for example in examples])
    read = sum(min(experiment.train.max_length, count) for count in counts)
    if not has_label_logits(model):
        answers = token_counts(tokenizer, [example.target or example.label for example in examples])
        read += sum(min(model.max_new_tokens, count) for count in answers)
    return len(task.train) * read / max(1, len(counts))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of one large product, the best of a few."""
    rows, width, columns = PRODUCT
    left = torch.ones(rows, width, device=device, dtype=dtype)
    right = torch.ones(width, columns, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * rows * width * columns / best


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
