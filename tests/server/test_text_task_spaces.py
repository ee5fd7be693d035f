"""A task whose answers are texts, where only sites have data."""

from __future__ import annotations

from deal_core.config.file import parse_experiment
from server.export import task_spaces


def test_its_empty_label_space_is_declared_and_no_data_are_asked_for():
    data = {
        "source": "sites",
        "labels": {"letters": [], "triage": ["Surgery", "Skin"]},
        "generation": ["letters"],
        "instructions": {"letters": "Answer the letter."},
    }
    experiment = parse_experiment({"data": data}, "test")
    spaces = {space.name: space for space in task_spaces(experiment, ("letters",))}
    assert spaces["letters"].labels == ()
    assert spaces["letters"].instruction == "Answer the letter."
    assert spaces["triage"].labels == ("Surgery", "Skin")
    assert (spaces["letters"].learnt, spaces["triage"].learnt) == (True, False)
