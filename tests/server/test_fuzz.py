"""Replies spoilt in every way we can think of: none reaches the model, none ends the run."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from server.folder import RunFolder
from server.run import run
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.server.fuzz_grid import FuzzGrid, lost, tiny_app, tiny_model
from tests.server.spoil import COUNTS, INT8, MUTATIONS, TEXT

HASTE = 1e4
"""Silence lasts until the deadline."""
pytestmark = pytest.mark.usefixtures("now", "one_thread")
CLIENTS, BAD, ROUNDS, TASKS = 10, 8, 9, 2
ARRIVALS = ("late", "error first", "duplicate")
"""Good updates that arrive as they should not."""
Place = tuple[int, int]
"""Task and round; number of the evaluation and 0."""


@dataclass
class Spoiler:
    """Chooses, seeded, who is bad in a round and how; ``replace`` makes the bad ones fail instead.

    Attributes:
        done: kind by place and client.
    """

    dtype: str
    replace: bool
    grid: FuzzGrid | None = None
    done: dict[Place, dict[str, str]] = field(default_factory=dict)

    def __call__(self, client, reply):
        if "status" not in reply.content:
            return [reply]
        place = self._place(reply)
        kind = self._plan(place).get(client)
        if kind is None:
            return [reply]
        self.done.setdefault(place, {})[client] = kind
        if self.replace:
            return [reply] if kind == "duplicate" else lost(reply)
        if kind in ARRIVALS:
            return self._arrives(kind, reply)
        generator = seeded("spoil", client, *place)
        (MUTATIONS | INT8 if place[1] else COUNTS)[kind](reply, generator)
        return [reply]

    def _place(self, reply):
        if "lora" not in reply.content:
            assert self.grid is not None
            return (len(self.grid.models) - 2) // (ROUNDS + 1), 0
        status = reply.content["status"]
        return int(status["stage"]), int(status["server_round"])

    def _plan(self, place):
        """Every kind comes in turn; who is hit is drawn."""
        order = torch.randperm(CLIENTS, generator=seeded("who", *place)).tolist()
        kinds = list(COUNTS)
        turn = place[0] * BAD
        if place[1]:
            kinds = [*MUTATIONS, *(INT8 if self.dtype == "int8" else ()), *ARRIVALS]
            turn = (place[0] * ROUNDS + place[1] - 1) * BAD
        return {str(order[i]): kinds[(turn + i) % len(kinds)] for i in range(BAD)}

    def _arrives(self, kind, reply):
        assert self.grid is not None
        if kind == "late":
            self.grid.held_back.append(reply)
            return []
        return [reply, reply] if kind == "duplicate" else [*lost(reply), reply]


def settings(folder, model, rule, dtype):
    return Experiment.model_validate(
        {
            "model": {"name": str(model)},
            "adapter": {
                "rank": 3,
                "retained_rank": 4,
                "target_modules": ("query", "intermediate.dense"),
            },
            "data": {"tasks": ("laboratory", "surgery")},
            "method": {"prototype": {"enabled": "off"}},  # rounds that train
            "federation": {"clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.05},
            "aggregation": {"rule": rule},
            "wire": {"dtype": dtype},
            "run": {"out": str(folder)},
        }
    )


def fuzzed(experiment, replace):
    """Run to the end; the log is read back from the file."""
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    inner = InProcessGrid(tiny_app(experiment, shapes), to_run_config(experiment), CLIENTS)
    folder = RunFolder(Path(experiment.run.out))
    spoiler = Spoiler(experiment.wire.dtype, replace)
    grid = FuzzGrid(inner, shapes, folder, spoiler)
    spoiler.grid = grid
    with assume_identity(1, 1):
        run(grid, experiment)
    log = folder.metrics.read_text(encoding="utf-8")
    assert TEXT not in log
    assert max(map(len, log.splitlines())) < 2000
    return grid, spoiler, [json.loads(line) for line in log.splitlines()]


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        ("fedit", "float32"),
        ("ffa", "int8"),
        pytest.param("fedit", "int8", marks=pytest.mark.slow),
        pytest.param("ffa", "float32", marks=pytest.mark.slow),
    ],
)
def test_no_spoilt_reply_changes_the_model_or_ends_the_run(tmp_path, rule, dtype):
    model = tiny_model(tmp_path / "model")
    grid, spoiler, events = fuzzed(settings(tmp_path / "a", model, rule, dtype), False)
    clean, _, _ = fuzzed(settings(tmp_path / "b", model, rule, dtype), True)
    assert grid.models == clean.models
    assert len(grid.models) == 1 + 1 + TASKS * (ROUNDS + 1)  # hello, zero-shot, rounds, end
    assert len(set(map(str, grid.models))) > TASKS * ROUNDS
    kinds = Counter(kind for place in spoiler.done.values() for kind in place.values())
    assert set(kinds) == {*MUTATIONS, *COUNTS, *ARRIVALS, *(INT8 if dtype == "int8" else ())}
    assert sum(kinds.values()) == BAD * (TASKS * ROUNDS + TASKS + 1)
    check_log(spoiler, events)


def check_log(spoiler, events):
    """In every step exactly the bad clients failed, each once, with a reason; a second reply
    is named as dropped."""
    steps = [[]]
    for event in events:
        if event["event"].startswith("client_") or event["event"] == "reply_dropped":
            steps[-1].append(event)
        elif event["event"] in ("round_finished", "evaluated"):
            steps.append([])
    assert not steps.pop()
    assert len(steps) == len(spoiler.done)
    for place, step in zip(spoiler.done, steps, strict=True):
        done = spoiler.done[place]
        failed = [event["client"] for event in step if event["event"] == "client_failed"]
        assert Counter(failed) == Counter(c for c, kind in done.items() if kind != "duplicate")
        assert all(0 < len(e["reason"]) < 500 for e in step if e["event"] == "client_failed")
        dropped = [event["client"] for event in step if event["event"] == "reply_dropped"]
        twice = (c for c, kind in done.items() if kind in ("duplicate", "error first"))
        assert Counter(dropped) == Counter(twice)
        if place[1]:
            good = [event["client"] for event in step if event["event"] == "client_finished"]
            assert Counter(good) == Counter(
                str(c) for c in range(CLIENTS) if done.get(str(c), "duplicate") == "duplicate"
            )
