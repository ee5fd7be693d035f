from __future__ import annotations

import json

import pytest

from deal_core.config import Experiment
from deal_core.errors import UserError
from server.checkpoint import History
from server.results import make_results, read_results, write_results

HISTORY = History(
    evaluations=(
        {"0": [[1, 2], [0, 0]], "1": [[1, 2], [2, 4]]},
        {"0": [[2, 2], [0, 0]], "1": [[2, 2], [1, 4]]},
        {"0": [[1, 2], [0, 0]], "1": [[2, 2], [3, 4]]},
    ),
    bytes_up=(10.0, 20.0),
    bytes_down=(30.0, 40.0),
    aggregation_error=(0.1, 0.2),
    seconds={"train": 2.0, "evaluate": 1.0},
    peak_rss_bytes=7,
)


def test_measures_follow_from_the_counts():
    results = make_results(Experiment(), ["a", "b"], HISTORY)
    assert results.accuracy_matrix == [[1.0, 0.25], [0.75, 0.75]]
    assert results.zero_shot == {"a": 0.5, "b": 0.5}
    assert results.average_accuracy == 0.75
    assert results.backward_transfer == -0.25
    assert results.forward_transfer == -0.25
    assert results.forgetting == 0.25
    assert results.seconds["total"] == 3.0
    # a client without a test example of a task is not counted as wrong there
    first = results.per_client["0"]
    assert first.accuracy_matrix == [[1.0, None], [0.5, None]]
    assert first.average_accuracy == 0.5
    assert first.test_examples == [2, 0]
    assert results.per_client["1"].average_accuracy == pytest.approx((1.0 + 0.75) / 2)


def test_no_privacy_means_no_epsilon():
    privacy = make_results(Experiment(), ["a", "b"], HISTORY).privacy
    assert privacy.mechanism == "none"
    assert privacy.epsilon == {}


def test_file_round_trip_and_schema(tmp_path):
    results = make_results(Experiment(), ["a", "b"], HISTORY)
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path) == results
    data = json.loads((tmp_path / "results.json").read_text())
    assert set(data) == {
        *("config", "engine", "seed", "tasks", "accuracy_matrix", "zero_shot"),
        *("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"),
        *("per_client", "privacy", "wire", "aggregation_error", "seconds"),
        *("peak_rss_bytes", "versions", "schema_version"),
    }


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 1, "extra": 2}'])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="not a valid results file"):
        read_results(tmp_path)


def test_an_unfinished_run_says_so(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        read_results(tmp_path)
