"""Processes that train side by side: how many there are, and what each of them gets."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from deal_core.config.experiment import Experiment


@dataclass(frozen=True)
class Workers:
    """How a machine is divided.

    Attributes:
        count: processes that train at the same time, each with a base model of its own.
        threads: torch threads of each.
        gpus: GPUs of each; 1 where there are enough, a share where several use one, 0: none.
    """

    count: int
    threads: int
    gpus: float


def divide(experiment: Experiment, cores: int, gpus: int) -> Workers:
    """Return how ``cores`` and ``gpus`` are divided, as ``run.workers`` and ``run.threads`` ask.

    Nothing asked: one worker per GPU, or one per core where there is none, and each has an
    equal part of the cores. There are never more workers than clients. The thread count
    changes rounding: for the very numbers of another engine set ``run.threads`` in both.
    """
    run = experiment.run
    wanted = run.workers or gpus or max(1, cores // (run.threads or 1))
    count = min(wanted, experiment.federation.clients)
    threads = run.threads or max(1, cores // count)
    # Ray counts in ten-thousandths: rounded up, the last share would not fit.
    share = math.floor(min(1.0, gpus / count) * 10_000) / 10_000
    return Workers(count, threads, share)


def this_machine(experiment: Experiment) -> Workers:
    """Divide the cores and GPUs of this machine."""
    import torch

    return divide(experiment, os.cpu_count() or 1, torch.cuda.device_count())


def as_run_by(workers: Workers, experiment: Experiment) -> Experiment:
    """Return the experiment with the thread count settled: a client sees no other worker."""
    run = experiment.run.model_copy(update={"threads": workers.threads})
    return experiment.model_copy(update={"run": run})
