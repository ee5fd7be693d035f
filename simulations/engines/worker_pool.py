"""Processes that train side by side: how many there are, what each of them gets, and who they are
to Flower."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import context, forkserver, get_context, parent_process
from threading import Lock, Thread

from flwr.app import Context, Message
from flwr.supercore.task_identity import TaskIdentity

from deal_core.config.experiment import Experiment
from simulations.engines.interrupt import ignoring_ctrl_c


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
    return divide(experiment, os.cpu_count() or 1, gpus_here())


def as_run_by(workers: Workers, experiment: Experiment) -> Experiment:
    """Return the experiment with the thread count settled: a client sees no other worker."""
    run = experiment.run.model_copy(update={"threads": workers.threads})
    return experiment.model_copy(update={"run": run})


SHOWN = "CUDA_VISIBLE_DEVICES"


def gpus_here() -> int:
    """Return how many GPUs torch sees; it loads here."""
    import torch

    return torch.cuda.device_count()


def shown_gpu(place: int, gpus: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what goes into the environment of a process before it uses CUDA; nothing where there
    is no choice.

    Args:
        place: number of the process among those that work side by side, from 0.
        gpus: that torch sees here.
        environment: shows them.
    """
    if gpus < 2:
        return {}
    names = environment.get(SHOWN, "").split(",")
    known = names if len(names) == gpus else [str(number) for number in range(gpus)]
    return {SHOWN: known[place % gpus]}


@dataclass(frozen=True)
class Job:
    """A request on its way: ``outcome`` will hold the reply, or what went wrong."""

    request: Message
    context: Context
    outcome: Future[Message]


class WorkerPool:
    """A client's requests go to the same worker, which has its texts and its teacher at hand,
    unless another one has nothing left to do. Who answers changes no number.

    A worker that ends before its time ends the pool: whatever waits, or is asked later, gets
    :class:`~concurrent.futures.BrokenExecutor`.
    """

    def __init__(self, executors: list[ProcessPoolExecutor]) -> None:
        self._executors = executors
        self._queues: list[deque[Job]] = [deque() for _ in executors]
        self._idle = set(range(len(executors)))
        self._open = True
        self._broken: BrokenExecutor | None = None
        self._lock = Lock()

    def submit(self, client: int, request: Message, context: Context) -> Future[Message]:
        """Queue a request; return its reply to come."""
        job = Job(request, context, Future())
        with self._lock:
            self._queues[client % len(self._queues)].append(job)
        self._feed()
        return job.outcome

    def close(self) -> None:
        """Start nothing more: what waits will not be answered."""
        with self._lock:
            self._open = False

    def _feed(self) -> None:
        """Give every idle worker its next request, or the last one of the longest queue."""
        started = self._start()
        for running, worker, job in started:  # outside the lock: it may be done already
            running.add_done_callback(partial(self._finished, worker, job))
        if self._broken is not None:
            self._fail(self._broken)

    def _start(self) -> list[tuple[Future[Message], int, Job]]:
        started = []
        with self._lock:
            own_work_first = sorted(self._idle, key=lambda worker: not self._queues[worker])
            for worker in own_work_first:
                own, longest = self._queues[worker], max(self._queues, key=len)
                if not longest or not self._open or self._broken:
                    break
                job = own.popleft() if own else longest.pop()
                try:
                    running = self._executors[worker].submit(answer, job.request, job.context)
                except BrokenExecutor as fault:
                    self._broken = fault
                    own.append(job)  # to be told with all that wait
                    break
                self._idle.remove(worker)
                started.append((running, worker, job))
        return started

    def _finished(self, worker: int, job: Job, running: Future[Message]) -> None:
        if running.cancelled():
            return
        fault = running.exception()
        with self._lock:
            if isinstance(fault, BrokenExecutor):
                self._broken = fault
            else:
                self._idle.add(worker)
        if fault is None:
            job.outcome.set_result(running.result())
        else:
            job.outcome.set_exception(fault)
        self._feed()

    def _fail(self, fault: BrokenExecutor) -> None:
        """Tell everybody who waits."""
        with self._lock:
            waiting = [job for queue in self._queues for job in queue]
            for queue in self._queues:
                queue.clear()
        for job in waiting:
            job.outcome.set_exception(fault)


@contextmanager
def worker_pool(workers: Workers, run_id: int, node_id: int) -> Iterator[WorkerPool | None]:
    """Yield started workers that answer for the nodes of the run, and stop them at the end; one
    worker is no gain over this process, so there is none."""
    if workers.count == 1:
        yield None
        return
    context = start_forkserver()
    with ExitStack() as stack:
        gpus = gpus_here()
        executors = [
            ProcessPoolExecutor(1, context, prepare, (run_id, node_id, shown_gpu(place, gpus)))
            for place in range(workers.count)
        ]
        for executor in executors:
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        # In threads, where no signal arrives: a start that is torn apart leaves a worker that
        # complains on its own.
        starter = stack.enter_context(ThreadPoolExecutor(len(executors)))
        for executor in executors:
            starter.submit(executor.submit, os.getpid)
        pool = WorkerPool(executors)
        stack.callback(pool.close)  # first: a worker that ends its request must not get another
        yield pool


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

    return app(request, context)
