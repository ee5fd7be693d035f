"""Contestants in real processes; this file imports little, since they do."""

import json

import pytest

import measuring


def counted(start):
    """Does one more piece of work in each window."""
    done = iter([start, start + 1, start + 2])
    return lambda: {"work": next(done), "seconds": 2.0, "more": 7.0}


def test_contestants_have_processes_of_their_own_and_ratios_are_of_pairs(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measuring, "PRELOADED", [])
    path = tmp_path / "out.json"
    figures = measuring.Figures("any", "", ["--out", str(path)])
    assert figures.size == "usual"
    assert json.loads(path.read_text())["tables"] == {}
    contestants = [measuring.Contestant(name, counted, (n,)) for name, n in (("a", 1), ("b", 3))]
    figures.race("Title", contestants, windows=2)
    first, second = json.loads(path.read_text())["tables"]["Title"]
    assert (first["per second"], first["ratio"], first["memory"]) == (1.25, 1.0, 1.0)
    assert (second["per second"], second["more"]) == (2.25, 7.0)
    assert (second["least"], second["most"]) == (5 / 3, 2.0)
    assert second["MB"] > 10
    assert "Title" in capsys.readouterr().out
    with pytest.raises(TypeError):
        figures.race("Title", [measuring.Contestant("bad", counted, ("x",))])
