import os
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from queue import Queue

import psutil
import pytest

from deal_core.config.experiment import Experiment, FederationConfig, RunConfig
from deal_core.errors import UserError
from simulations.engines import deferred, stoppable
from simulations.engines.worker_pool import WorkerPool, Workers, divide, shown_gpu
from tests.conftest import SHORT
from tests.simulations.runs import IN_SUM, assert_same_run, simulated
from tests.sizes import QUIET, TINY
from tests.slow import slow_but


class Line:
    """An executor that works when the test says so; its process may be ``gone``."""

    def __init__(self):
        self.jobs = Queue()
        self.gone = False

    def submit(self, function, request, context):
        if self.gone:
            raise BrokenExecutor("gone")
        future = Future()
        self.jobs.put((request, future))
        return future

    def finish(self, fault=None):
        request, future = self.jobs.get(timeout=5)
        if fault is None:
            future.set_result(f"reply to {request}")
        else:
            future.set_exception(fault)
        return request

    def shutdown(self, cancel_futures):
        """Nothing has been started."""


def test_a_client_keeps_its_worker_unless_another_has_less_to_do():
    lines = [Line(), Line()]
    pool = WorkerPool(lines)
    outcomes = [pool.submit(client, str(client), None) for client in (0, 1, 2, 4)]
    assert [lines[0].finish(), lines[0].finish()] == ["0", "2"]
    assert [lines[1].finish(), lines[1].finish()] == ["1", "4"]  # the second helps out
    assert [o.result(5) for o in outcomes] == [f"reply to {n}" for n in "0124"]
    pool.submit(1, "late", None)
    assert lines[1].finish() == "late"


def test_a_fault_is_the_callers_and_what_waits_is_started():
    line = Line()
    pool = WorkerPool([line])
    faulty, next_one = pool.submit(0, "a", None), pool.submit(0, "b", None)
    line.finish(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        faulty.result(5)
    assert line.finish() == "b"
    assert next_one.result(5) == "reply to b"


def test_a_worker_that_ends_before_its_time_is_told_to_all_that_ask_it():
    lines = [Line(), Line()]
    pool = WorkerPool(lines)
    outcomes = [pool.submit(0, request, None) for request in "abcd"]
    lines[1].gone = True
    lines[1].finish(BrokenExecutor("gone"))
    for waiting in (outcomes[1], outcomes[3]):
        with pytest.raises(BrokenExecutor):
            waiting.result(timeout=5)
    assert lines[0].finish() == "a"
    assert outcomes[0].result(timeout=5) == "reply to a"
    assert lines[0].finish() == "c"
    with pytest.raises(BrokenExecutor):
        pool.submit(1, "e", None).result(timeout=5)


def test_a_closed_pool_starts_nothing_more():
    line = Line()
    pool = WorkerPool([line])
    asked, waiting = pool.submit(0, "a", None), pool.submit(0, "b", None)
    while line.jobs.empty():
        time.sleep(0.001)
    pool.close()
    line.finish()
    assert asked.result(5) == "reply to a"
    assert waiting.cancelled()
    assert line.jobs.empty()


KINDS = {
    "int8": ('wire.dtype="int8"', "method.prototype.enabled=on", *QUIET),
    "sums": ("method.name=linear-probe",),
    "secure": ("aggregation.secure=true", "method.prototype.enabled=off"),
    "private": IN_SUM,
}
"""With error feedback, whose stores travel between the workers too, and heads from sums; with sums
in every round; with secure sums, whose state any worker may have to go on from; with noise in them,
which is charged to ledgers that any worker may write."""


@pytest.mark.parametrize("kind", slow_but(KINDS, "int8"))
def test_workers_give_the_very_numbers_of_one_process(kind, make_experiment, fork, tmp_path):
    """The same experiment in this process, and in another one with two workers."""
    settings = ("federation.clients=3", *KINDS[kind], *TINY)
    alone, together = tmp_path / "alone", tmp_path / "together"
    simulated(make_experiment(*settings), alone)
    together.mkdir()
    with run_of(fork, together, *SHORT, *settings, "run.workers=2") as run:
        assert run.wait() == 0, run.stderr
    assert_same_run(alone, together)


RUN = """
import sys
from pathlib import Path
from deal_core.config.file import apply_overrides, parse_experiment
from simulations.engines.inprocess import run_inprocess

if __name__ == "__main__":
    tables = apply_overrides({}, sys.argv[2:])
    experiment = parse_experiment(tables, "test")
    run_inprocess(experiment, lambda event: print(event["event"], flush=True))
"""


def run_of(fork, folder, *settings):
    script = folder / "run.py"
    script.write_text(RUN)
    return fork(str(script), "x", *settings, f'run.out="{folder}"')


def start_run(fork, folder):
    settings = ('data.tasks=["surgery"]', "federation.clients=2", "run.workers=2", *TINY)
    # It cannot end before it is killed.
    return run_of(fork, folder, *settings, "federation.rounds=500")


def wait_for(run, line):
    while line not in run.stdout.splitlines():
        assert run.poll() is None, f"no {line}: {run.stderr}"
        time.sleep(0.01)


def workers_of(run):
    """The forked ones: children of the fork server."""
    found = psutil.Process(run.pid).children(recursive=True)
    return [p for p in found if p.ppid() != run.pid]


def test_workers_end_with_a_parent_that_is_killed(fork, tmp_path):
    with start_run(fork, tmp_path) as run:
        wait_for(run, "round_started")
        workers = workers_of(run)
        assert len(workers) == 2
        run.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


@pytest.mark.parametrize("killed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_worker_stops_the_run_with_a_way_on(fork, tmp_path, killed):
    with start_run(fork, tmp_path) as run:
        wait_for(run, "round_started")
        for worker in workers_of(run)[:killed]:
            worker.send_signal(signal.SIGKILL)
        _, errors = run.communicate()
    assert run.returncode == 1
    assert UserError.__name__ in errors
    assert "continue with --resume" in errors


SLOW_IMPORT = """
import pathlib
import time

here = pathlib.Path(__file__)
here.with_name("begun").touch()
while not here.with_name("go").exists():
    time.sleep(0.05)
"""
POOL = """
from simulations.engines.worker_pool import PRELOADED
from simulations.engines import stoppable
from simulations.engines.worker_pool import worker_pool
from simulations.engines.worker_pool import Workers

if __name__ == "__main__":
    PRELOADED.append("slow_import")
    with stoppable("it"), worker_pool(Workers(2, 1, 0), 1, 1) as pool:
        print("waiting", flush=True)
        pool.submit(0, None, None).result()
"""


@pytest.mark.parametrize(
    ("send", "number"),
    [
        pytest.param(os.kill, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(os.kill, signal.SIGTERM, marks=pytest.mark.slow),
        (os.killpg, signal.SIGINT),
    ],
)
def test_a_signal_while_workers_start_leaves_one_traceback(fork, tmp_path, send, number):
    """A terminal sends Ctrl-C to the whole group, workers and their imports included."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    (tmp_path / "slow_import.py").write_text(SLOW_IMPORT)  # as torch is, where nobody has it yet
    with fork(str(script), own_session=True) as run:
        wait_for(run, "waiting")
        while not (tmp_path / "begun").exists():  # the fork server imports
            assert run.poll() is None, run.stderr
            time.sleep(0.01)
        send(run.pid, number)
        (tmp_path / "go").touch()
        _, errors = run.communicate()
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


def asked(clients=100, threads=0, workers=0):
    return Experiment(
        federation=FederationConfig(clients=clients),
        run=RunConfig(threads=threads, workers=workers),
    )


@pytest.mark.parametrize(
    ("experiment", "cores", "gpus", "expected"),
    [
        (asked(), 8, 0, Workers(8, 1, 0.0)),
        (asked(clients=2), 8, 0, Workers(2, 4, 0.0)),
        (asked(threads=2), 8, 0, Workers(4, 2, 0.0)),
        (asked(threads=16), 8, 0, Workers(1, 16, 0.0)),
        (asked(workers=3), 8, 0, Workers(3, 2, 0.0)),
        (asked(workers=3, threads=1), 8, 0, Workers(3, 1, 0.0)),
        (asked(workers=4), 2, 0, Workers(4, 1, 0.0)),
        (asked(), 16, 2, Workers(2, 8, 1.0)),
        (asked(workers=1), 16, 2, Workers(1, 16, 1.0)),
        (asked(workers=4), 16, 1, Workers(4, 4, 0.25)),
        (asked(workers=3), 16, 1, Workers(3, 5, 0.3333)),
    ],
)
def test_cores_and_gpus_are_divided(experiment, cores, gpus, expected):
    assert divide(experiment, cores, gpus) == expected


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_as_many_actors_fit_as_there_are_workers(gpus):
    """Flower's arithmetic (``pool_size_from_resources``), and no GPU is promised twice."""
    for workers in range(1, 60):
        divided = divide(asked(workers=workers), 16, gpus)
        cpus = divided.count * divided.threads
        actors = min(int(cpus / divided.threads), int(gpus / divided.gpus))
        assert actors == divided.count == workers
        assert 0 < divided.gpus <= 1
        assert divided.count * divided.gpus <= gpus


@pytest.mark.parametrize(
    ("gpus", "shown", "found"),
    [
        (0, None, [{}] * 3),
        (1, None, [{}] * 3),
        (2, None, [{"CUDA_VISIBLE_DEVICES": name} for name in "010"]),
        (2, "3,5", [{"CUDA_VISIBLE_DEVICES": name} for name in "353"]),
        (3, "GPU-a,GPU-b,GPU-c", [{"CUDA_VISIBLE_DEVICES": f"GPU-{name}"} for name in "abc"]),
    ],
)
def test_each_process_is_shown_one_shown_gpu_that_torch_sees(gpus, shown, found):
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert [shown_gpu(place, gpus, environment) for place in range(3)] == found


STUBBORN = """
import subprocess
import sys
import time
from simulations.engines import stoppable, uninterrupted

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with stoppable("a child lets go"):
    try:
        print(child.pid, "ready", sep=chr(10), flush=True)
        time.sleep(60)
    finally:
        with uninterrupted():
            time.sleep(60)
"""


def test_a_signal_says_what_it_waits_for_and_a_second_one_ends_at_once(fork, tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    with fork(str(script), own_session=True) as run:
        wait_for(run, "ready")
        run.send_signal(signal.SIGINT)
        while "stopping: a child lets go; Ctrl-C again ends at once" not in run.stderr:
            assert run.poll() is None, run.stderr
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        run.communicate()
        assert run.returncode == 130
        with suppress(psutil.NoSuchProcess):
            child = psutil.Process(int(run.stdout.split()[0]))
            assert child.status() == psutil.STATUS_ZOMBIE  # until somebody asks for its end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number):
    done = []

    def start():
        with stoppable("it"):
            with deferred():
                signal.raise_signal(number)
                signal.raise_signal(number)
                done.append("the whole block")
            done.append("what comes after it")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done == ["the whole block"]


def test_what_is_started_in_the_block_hears_signals():
    """Ignored or blocked, they would be so in the new process as well."""
    with deferred():
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_a_fault_in_the_block_is_told_and_the_signal_as_well():
    def start():
        with stoppable("it"), deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("no")

    with pytest.raises(KeyboardInterrupt) as caught:
        start()
    assert isinstance(caught.value.__context__, ValueError)
