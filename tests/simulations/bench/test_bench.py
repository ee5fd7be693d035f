from __future__ import annotations

import json
import sys

import pytest

from deal_core.aggregation import AGGREGATION_RULES
from deal_core.errors import UserError
from simulations import cli
from simulations.bench.aggregation import LINEAR, Sizes, cells
from simulations.bench.exactness import SETTINGS
from simulations.bench.figures import figures_to


@pytest.fixture
def bench(monkeypatch, capsys):
    """Call ``deal bench …``; returns what it prints."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["deal", "bench", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_every_rule_is_measured_and_the_ratios_fit(bench, tmp_path):
    path = tmp_path / "bench.json"
    printed = bench("aggregation", "--quick", "--out", str(path))
    rows = json.loads(path.read_text())["rows"]
    assert [row["rule"] for row in rows] == list(AGGREGATION_RULES)
    for row in rows:
        assert row["rule"] in printed
        assert 0 < row["seconds_rule"] < row["seconds_checked"]
        assert row["ratio"] == pytest.approx(row["seconds_rule"] / row["seconds_flower"])
        assert row["ratio_checked"] == pytest.approx(
            row["seconds_checked"] / row["seconds_decoded"]
        )
    sent = {row["rule"]: row["client_bytes"] for row in rows}
    assert sent["ffa"] * 2 == sent["fedit"]
    assert sent["fedit"] >= 12 * 2 * 8 * 384 * 4


def test_a_thousand_clients_for_linear_rules_only():
    large = {cell.rule for cell in cells(Sizes()) if cell.clients == 1000}
    assert large == set(LINEAR)


@pytest.mark.slow
def test_exact_rules_are_exact_and_the_baseline_is_not(bench):
    header, _, *lines = bench("exactness").strip().splitlines()
    assert all(setting.name in header for setting in SETTINGS)
    cells_of = {}
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        cells_of[name.strip("`")] = [float(cell) for cell in cells if cell != "–"]
    assert list(cells_of) == list(AGGREGATION_RULES)
    for name, errors in cells_of.items():
        if name == "fedit":
            assert min(errors) > 1e-5
            assert max(errors) > 0.05
        else:
            assert max(errors) < 1e-5
    assert {len(errors) for errors in cells_of.values()} == {4, 5}


def test_the_secure_sum_is_exact_and_its_figures_fit(bench, tmp_path):
    path = tmp_path / "bench.json"
    printed = bench("secure", "--quick", "--out", str(path))
    described = json.loads(path.read_text())
    assert "a round grows as" in printed
    assert [row["sites"] for row in described["rows"]] == [4, 8, 4, 8]
    for row in described["rows"]:
        assert row["exact"]
        assert row["bytes_ratio"] == row["bytes_up"] / row["vector_bytes"]
        # The words, and shares for every peer; nothing else.
        extra = 283 + 48 * (row["sites"] - 1) + 32 * row["sites"]
        assert row["vector_bytes"] < row["bytes_up"] < row["vector_bytes"] + extra
        assert row["round_seconds"] > row["site_seconds"] > row["site_seconds_mask"] > 0
    assert {line["dropped"] for line in described["growth"]} == {0, 0.25}


def test_the_share_of_secure_sums_is_of_rounds_that_train(bench, tmp_path):
    path = tmp_path / "share.json"
    printed = bench("secure-share", "--quick", "--out", str(path))
    described = json.loads(path.read_text())
    assert "of a round's processor time" in printed
    assert len(described["rounds"]) == 2
    for number, whole in enumerate(described["rounds"]):
        own = [seconds[number] for seconds in described["parts"].values()]
        assert all(each > 0 for each in own)
        assert sum(own) < whole
    assert 0 < described["share"] < 1


MEASURING = {
    "aggregation": "aggregation.rows_of",
    "step": "step.measured",
    "step --family causal-lm": "step_causal.measured",
    "scoring": "scoring.timed_in_turn",
    "privacy": "privacy.measured",
    "secure": "secure.rows_of",
    "secure-share": "secure_share.measure",
    "memory": "memory.timed_in_turn",
    "engine": "engine.measured",
    "scale": "scale.measured",
}
"""Command to what takes long."""


@pytest.mark.parametrize("name", MEASURING)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    monkeypatch, capsys, tmp_path, name
):
    def measure(*arguments: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(f"simulations.bench.{MEASURING[name]}", measure)
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out.json")
    monkeypatch.setattr(sys, "argv", ["deal", "bench", *name.split(), "--quick", "--out", out])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--out {out}: " in line


def test_figures_are_written_whole_and_say_of_which_machine(tmp_path):
    path = tmp_path / "out.json"
    write = figures_to(str(path))
    write({"rows": [1]})
    write({"rows": [1, 2]})
    described = json.loads(path.read_text())
    assert list(described) == ["machine", "rows"]
    assert described["rows"] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]
    figures_to("")({"rows": []})  # nowhere
    for out, why in ((tmp_path / "no" / "x.json", "no folder"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=why):
            figures_to(str(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("step", "deal bfloat16"),
        ("step --family causal-lm", "deal, upper half"),
        ("scoring", "each option alone"),
        ("memory", "the default"),
        ("engine", "inprocess"),
        ("scale", "exponent"),
        ("privacy", "Cost of a private step"),
    ],
)
def test_every_bench_runs_in_its_smallest_size(bench, tmp_path, name, line):
    assert line in bench(*name.split(), "--quick", "--out", str(tmp_path / "out"))
    assert any(tmp_path.rglob("*"))
