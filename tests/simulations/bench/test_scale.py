from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from deal_core.errors import UserError
from simulations.bench import figures, scale
from simulations.bench.scale import points
from simulations.bench.scale_axes import Run, axes
from simulations.bench.scale_data import Stream, write_stream
from simulations.bench.scale_fit import Point, exponent


def curve(power: float, xs=(10, 100, 1000)) -> list[Point]:
    return [Point(x, 3.0 * x**power, 0.0, 0.0, 0.0, 0) for x in xs]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    assert exponent(curve(power)) == pytest.approx(power, abs=1e-9)


def test_one_point_has_no_exponent():
    assert math.isnan(exponent(curve(1.0, xs=(10,))))


def event(kind: str, task: int, seconds: float) -> dict:
    return {"event": kind, "stage": task, "seconds": seconds}


def test_the_first_round_and_the_first_task_are_told_apart():
    rounds = [event("round_finished", task, 10 * task + s) for task in range(3) for s in (9, 2, 4)]
    (point,) = points(Run(7, Stream()), [*rounds[:3], event("evaluated", 0, 1.0)], 5.0, 99)
    assert (point.x, point.seconds, point.least, point.most) == (7, 3, 2, 4)
    grown = list(points(Run(None, Stream()), rounds, 5.0, 99))
    assert [(p.x, p.seconds) for p in grown] == [(1, 14), (2, 24)]
    assert {(p.start_seconds, p.peak_bytes) for p in grown} == {(5.0, 99)}


def test_streams_have_the_size_that_is_asked_for(tmp_path):
    write_stream(tmp_path, Stream(tasks=2, labels=5, train=12, test=6, words=9))
    labels = []
    for task in sorted(tmp_path.iterdir()):
        rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
        assert len(rows) == 12
        assert {len(row["text"].split()) for row in rows} == {9}
        labels.append({row["label"] for row in rows})
        assert len((task / "test.jsonl").read_text().splitlines()) == 6
    assert [len(found) for found in labels] == [5, 5]
    assert not labels[0] & labels[1]


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(figures.os, "access", lambda *given: False)
    monkeypatch.setattr(scale, "measured", lambda run: pytest.fail("measured"))
    with pytest.raises(UserError, match="cannot be written"):
        scale.bench(axes(), Console(), str(tmp_path / "there"))


def test_one_thing_grows_at_a_time():
    for axis in axes():
        keys = [frozenset(run.settings) for run in axis.runs]
        assert len(set(keys)) == 1
        xs = [run.x for run in axis.runs if run.x is not None]
        assert xs == sorted(set(xs))
