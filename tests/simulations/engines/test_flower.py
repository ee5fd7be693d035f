import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from deal_core.config.experiment import Experiment, FederationConfig
from server.results import read_results
from simulations.engines import ENGINES
from simulations.engines.flower import (
    CONNECTION,
    LOG,
    Tail,
    flower_sandbox,
    members,
    resources,
    stop_all,
)
from simulations.engines.worker_pool import Workers
from tests.simulations.runs import IN_SUM, learnt_adapter
from tests.sizes import TINY


def test_the_tail_skips_what_was_there_and_waits_for_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "old"}\n')
    tail = Tail.from_end(path)
    assert list(tail.new()) == []
    with path.open("a") as file:
        file.write('{"event": "a"}\n{"eve')
        file.flush()
        assert list(tail.new()) == [{"event": "a"}]
        file.write('nt": "b"}\n')
    assert list(tail.new()) == [{"event": "b"}]
    assert list(Tail.from_end(tmp_path / "missing").new()) == []


def test_flower_gets_room_for_exactly_the_workers():
    four = Experiment(federation=FederationConfig(clients=4))
    assert resources(four, Workers(count=3, threads=2, gpus=0.0)) == {
        "num-supernodes": 4,
        "client-resources-num-cpus": 2,
        "init-args-num-cpus": 6,
    }
    assert resources(four, Workers(2, 1, 0.5))["client-resources-num-gpus"] == 0.5


@contextmanager
def sleeper(home):
    """A process with this home that has begun: until then its environment may read as empty."""
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    environment = {**os.environ, "FLWR_HOME": str(home)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"
            yield process
        finally:
            process.kill()


def test_only_what_was_started_with_the_home_is_stopped(tmp_path):
    with sleeper(tmp_path) as mine, sleeper(tmp_path / "other") as other:
        assert [process.pid for process in members(tmp_path)] == [mine.pid]
        stop_all(tmp_path)
        mine.wait(timeout=5)
        assert members(tmp_path) == []
        assert other.poll() is None


def test_the_sandbox_is_private_empty_and_leaves_nothing(tmp_path):
    log = tmp_path / LOG
    with flower_sandbox(log) as (home, start):
        assert list(home.empty.iterdir()) == []
        assert members(home.path)
        assert home.ask("list", CONNECTION)["runs"] == []
        assert start(["env"], tmp_path / "env").wait(timeout=30) == 0
    said = (tmp_path / "env").read_text().splitlines()
    assert {"FLWR_TELEMETRY_ENABLED=0", "RAY_USAGE_STATS_ENABLED=0"} <= set(said)
    assert not members(home.path)
    assert not home.path.exists()


KINDS = {
    "synchronous, with sums": ("method.prototype.enabled=on",),
    "per-client": (
        "stream.schedule=per-client",
        'stream.orders={0=["surgery", "laboratory"], 1=["surgery"]}',
    ),
    "secure sums": ("aggregation.secure=true", "federation.clients=3"),
    "noise in the sum": IN_SUM,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_give_the_same_numbers(tmp_path, make_experiment, kind):
    adapters, matrices, events, spent = [], [], [], []
    for name in ("inprocess", "flower", "loopback")[: 3 if "synchronous" in kind else 2]:
        out = tmp_path / name
        out.mkdir()
        seen = []
        asked = f'run.out="{out}"', f"run.engine={name}", "federation.rounds=1"
        ENGINES[name](
            make_experiment(*asked, *TINY, *KINDS[kind]),
            lambda event, seen=seen: seen.append(event["event"]),
        )
        events.append(seen)
        results = read_results(out)
        matrices.append([list(results.zero_shot.values()), *results.accuracy_matrix])
        spent.append(results.privacy.epsilon)
        adapters.append(learnt_adapter(out))
    assert bool(spent[0]) == (kind == "noise in the sum")
    for number, adapter in enumerate(adapters[1:], start=1):
        assert matrices[0] == matrices[number]
        assert spent[0] == spent[number]
        assert sorted(events[0]) == sorted(events[number])
        assert adapters[0].keys() == adapter.keys() != set()
        for key, value in adapters[0].items():
            np.testing.assert_allclose(value, adapter[key], rtol=1e-4, atol=1e-4)
