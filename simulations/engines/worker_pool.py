"""Processes that train side by side: how many there are, what each of them gets, and who they are
to Flower."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import context, forkserver, get_context, parent_process
from threading import Thread

from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity

from deal_core.config.experiment import Experiment
from deal_core.config.file import from_run_config
from simulations.engines import ignoring_ctrl_c, load_plugins


@contextmanager
def assume_identity(run_id: int, node_id: int) -> Iterator[None]:
    """Within the block, messages can be created as ``node_id`` of ``run_id``: Flower lets only its
    own processes create messages. Uses an internal of Flower 1.42, here and nowhere else."""
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    become(run_id, node_id)
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


def become(run_id: int, node_id: int) -> None:
    """From now on, messages can be created as ``node_id`` of ``run_id``."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = run_id
    TaskIdentity.node_id = node_id


PRELOADED = ["client.app", "client.requests", "flwr_datasets"]


def start_forkserver() -> context.ForkServerContext:
    """Start it, unless it runs; it imports in the background, and ends with this process.

    A terminal sends Ctrl-C to all processes; it and its workers leave that to this one.

    Returns:
        The context whose processes are forked from it.
    """
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with ignoring_ctrl_c():  # a new process inherits it
        forkserver.ensure_running()
    return processes


@dataclass(frozen=True)
class Workers:
    """How a machine is divided."""

    count: int
    """Processes that train at the same time, each with a base model of its own."""
    threads: int
    """Torch threads of each."""
    gpus: float
    """GPUs of each: 1 where there are enough, a share where several use one, 0: none."""


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
    return divide(experiment, os.cpu_count() or 1, gpus_here())


def as_run_by(workers: Workers, experiment: Experiment) -> Experiment:
    """Return the experiment with the thread count settled: a client sees no other worker."""
    return experiment.changed(run={"threads": workers.threads})


SHOWN = "CUDA_VISIBLE_DEVICES"


def gpus_here() -> int:
    """Return how many GPUs torch sees; it loads here."""
    import torch

    return torch.cuda.device_count()


def shown_gpu(place: int, gpus: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what goes into the environment of a process, the ``place``-th (from 0) of those that
    work side by side, before it uses CUDA; nothing where torch sees fewer than two GPUs."""
    if gpus < 2:
        return {}
    names = environment.get(SHOWN, "").split(",")
    known = names if len(names) == gpus else [str(number) for number in range(gpus)]
    return {SHOWN: known[place % gpus]}


class WorkerPool:
    """Workers that answer requests. A client's requests go to the same worker, which has its texts
    and its teacher at hand, unless another one has fewer to answer. Who answers changes no number.

    A worker that ends before its time gives :class:`~concurrent.futures.BrokenExecutor` to all that
    is asked of it.
    """

    def __init__(self, executors: Sequence[Executor]) -> None:
        self._executors = executors
        # A process takes its next requests before it has answered the last one, and they could not
        # be cancelled: a thread hands them over one at a time.
        self._threads = [ThreadPoolExecutor(1) for _ in executors]
        self._asked: list[list[Future[Message]]] = [[] for _ in executors]

    def submit(self, client: int, request: Message, context: Context) -> Future[Message]:
        """Queue a request; return its reply to come."""
        self._asked = [[each for each in own if not each.done()] for own in self._asked]
        count, home = len(self._executors), client % len(self._executors)
        worker = min(range(count), key=lambda each: (len(self._asked[each]), each != home))
        reply = self._threads[worker].submit(self._ask, worker, request, context)
        self._asked[worker].append(reply)
        return reply

    def _ask(self, worker: int, request: Message, context: Context) -> Message:
        return self._executors[worker].submit(answer, request, context).result()

    def start(self) -> None:
        """Start all processes: in the threads, where no signal tears a start apart."""
        for thread, executor in zip(self._threads, self._executors, strict=True):
            thread.submit(process_id, executor)

    def close(self) -> None:
        """Start nothing more, and wait for the requests that are being answered."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)


def process_id(executor: Executor) -> int:
    """Return the number of an executor's process; it is started where it does not run."""
    return executor.submit(os.getpid).result()


@contextmanager
def worker_pool(workers: Workers, run_id: int, node_id: int) -> Iterator[WorkerPool | None]:
    """Yield started workers that answer for the nodes of the run, and stop them at the end; one
    worker is no gain over this process, so there is none."""
    if workers.count == 1:
        yield None
        return
    processes, gpus = start_forkserver(), gpus_here()
    pool = WorkerPool(
        [
            ProcessPoolExecutor(1, processes, prepare, (run_id, node_id, shown_gpu(place, gpus)))
            for place in range(workers.count)
        ]
    )
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


def prepare(run_id: int, node_id: int, environment: Mapping[str, str]) -> None:
    """In a new worker: end with the parent, see one GPU, and be allowed to answer."""
    os.environ.update(environment)
    Thread(target=end_with_parent, daemon=True).start()
    become(run_id, node_id)


def end_with_parent() -> None:
    """A parent that was killed could not stop its workers."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def answer(request: Message, context: Context) -> Message:
    """In a worker: what the client says."""
    from client.app import app

    load_plugins(from_run_config(context.run_config).plugins)
    return app(request, context)
