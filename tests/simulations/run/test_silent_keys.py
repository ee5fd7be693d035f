"""Keys that would do nothing, or something else than was meant, say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deal_core.config.data import DataConfig
from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy
from simulations.api import experiment
from simulations.run.data_checks import check_declared
from simulations.run.findings import check_privacy


def parsed(*overrides: str):
    return parse_experiment(apply_overrides({}, overrides), "test")


def test_a_folder_of_ones_own_is_not_left_aside_for_the_embedded_data():
    with pytest.raises(UserError, match=r'data\.path = "mine" is read with data\.source = "files"'):
        check_declared(parsed('data.path="mine"'))
    check_declared(parsed('data.path="mine"', "data.source=files"))


@pytest.mark.parametrize(
    "key", ["target_epsilon=1.0", "target_delta=1e-6", 'unit_column="patient"']
)
def test_a_budget_without_a_mechanism_protects_nothing(key):
    (found,) = check_privacy(parsed(f"privacy.{key}"))
    assert found.kind == "warning"
    assert found.text.startswith(f"privacy.{key.partition('=')[0]} is set, and privacy.mechanism")
    assert list(check_privacy(parsed())) == []
    assert list(check_privacy(parsed(f"privacy.{key}", "privacy.mechanism=record"))) == []


def test_a_mechanism_that_is_none_is_no_policy():
    with pytest.raises(ValueError, match="'record'"):
        Policy.model_validate({"mechanism": "rec"})


def test_a_label_may_not_be_mapped_to_nothing():
    with pytest.raises(UserError, match="'a' stands for an empty label"):
        parsed('data.files.ward.label_text={a=" "}')


@pytest.mark.parametrize("key", ["adapter.rank", "federation.clients"])
def test_what_no_machine_holds_is_refused_before_it_is_tried(key):
    with pytest.raises(UserError, match=f"{key}.*should be less than or equal to"):
        parsed(f"{key}=1000000000000")


def rows(folder: Path, **more: object) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"text {n}", "target": "yes", **more}) for n in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def test_a_column_of_further_answers_that_no_row_has_is_a_typing_error(tmp_path):
    rows(tmp_path / "summary", also="indeed")

    def load(column: str):
        config = DataConfig(
            source="files",
            path=str(tmp_path),
            generation=("summary",),
            references_column=column,
        )
        return open_source(config).load("summary")

    assert load("also").test[0].references == ("indeed",)
    with pytest.raises(UserError, match="no row has the column 'alzo' of further right answers"):
        load("alzo")


def test_values_of_a_notebook_are_numbers():
    read = experiment("quickstart", {"train.learning_rate": np.float64(0.25)})
    assert read.train.learning_rate == 0.25
    with pytest.raises(UserError, match="overrides: dotted keys and their values"):
        experiment("quickstart", ["federation.rounds=1"])
