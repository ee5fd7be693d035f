"""An evaluation and a site that is lost in it: it is asked once more, and never a third time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message

import server.run
from deal_core.models import adapter_shapes
from deal_core.run_config import flatten
from server import roster, rounds
from server.folder import RunFolder
from server.results import read_results
from simulations.identity import assume_identity
from simulations.inprocess import InProcessGrid
from tests.server.fuzz_grid import FuzzGrid, lost, tiny_app, tiny_model
from tests.server.test_fuzz import settings

PATIENCE = 100.0


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waiting takes no time."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    monkeypatch.setattr(rounds, "time", clock)
    monkeypatch.setattr(roster, "time", clock)


@dataclass
class Away:
    """Loses the first ``times`` counts of client 1 in every evaluation.

    Attributes:
        after: looks from the server that pass, once it is lost, before it is connected again.
        told: counts of client 1 that were made, by evaluation.
    """

    times: int
    after: int = 0
    evaluation: int = 0
    told: Counter[int] = field(default_factory=Counter)
    absent: int = 0

    def listen(self, event: dict[str, Any]) -> None:
        self.evaluation += event["event"] == "evaluated"

    def __call__(self, client: str, reply: Message) -> list[Message]:
        if client != "1" or "metrics" not in reply.content or "lora" in reply.content:
            return [reply]
        self.told[self.evaluation] += 1
        if self.told[self.evaluation] > self.times:
            return [reply]
        self.absent = self.after
        return lost(reply)

    def connected(self, nodes: dict[str, int]) -> dict[str, int]:
        if not self.absent:
            return nodes
        self.absent -= 1
        return {name: node for name, node in nodes.items() if name != "1"}


def run_with(away: Away, patience: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    experiment = settings(folder / "run", tiny_model(folder / "model"), "fedit", "float32")
    federation = experiment.federation.model_copy(update={"clients": 3, "rounds": 1})
    experiment = experiment.model_copy(update={"federation": federation})
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    inner = InProcessGrid(tiny_app(experiment, shapes), flatten(experiment), 3)
    grid = FuzzGrid(inner, shapes, RunFolder(folder / "run"), away)
    find = server.run.find_roster

    def registered(*arguments: Any) -> roster.Roster:
        """Clients that can come and go, as sites do."""
        found = find(*arguments)
        nodes = dict(found.connected())
        return replace(found, connected=lambda: away.connected(nodes), patience=patience)

    monkeypatch.setattr(server.run, "find_roster", registered)
    with assume_identity(1, 1):
        server.run.run(grid, experiment, away.listen)  # type: ignore[arg-type]
    return folder / "run"


@pytest.mark.parametrize("after", [0, 3])
def test_a_site_that_was_lost_is_asked_again_when_it_is_back(tmp_path, monkeypatch, after):
    away = Away(times=1, after=after)
    results = read_results(run_with(away, PATIENCE, tmp_path, monkeypatch))
    assert away.told == {0: 2, 1: 2, 2: 2}  # zero-shot, and two tasks
    assert results.per_client["1"].test_examples == [2, 2]
    assert results.per_client == dict.fromkeys("012", results.per_client["1"])


@pytest.mark.parametrize(
    ("times", "after", "patience", "asked"),
    [(99, 0, PATIENCE, 2), (1, 10**6, PATIENCE, 1), (1, 0, 0.0, 1)],
    ids=["silent twice", "away for good", "simulated"],
)
def test_the_run_goes_on_without_a_site_that_stays_away(
    tmp_path, monkeypatch, times, after, patience, asked
):
    away = Away(times, after)
    results = read_results(run_with(away, patience, tmp_path, monkeypatch))
    assert max(away.told.values()) == asked
    assert results.per_client.keys() == {"0", "2"}
    assert results.per_client["0"].test_examples == [2, 2]
