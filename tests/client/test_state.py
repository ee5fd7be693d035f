import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from client.state import RoundStore, TaskStore, forget, sums_once, update_once
from deal_core.privacy.interface import LocalUpdate
from deal_core.wire.instruction import Instruction


def adding(number):
    """Adds a number to what was kept; tells from which task."""

    def make(before, tensors):
        return {"sum": tensors.get("sum", torch.zeros(1)) + number, "from": torch.tensor([before])}

    return make


def test_what_is_kept_of_a_task_grows_from_the_latest_before_it(tmp_path):
    store = TaskStore(tmp_path / "site")
    assert store.get_or_compute(1, "one", adding(1.0))["from"] == 0
    third = store.get_or_compute(3, "three", adding(10.0))
    assert third["from"] == 1
    assert third["sum"] == 11.0


def test_a_repeated_request_finds_what_is_kept_and_another_run_makes_its_own(tmp_path):
    TaskStore(tmp_path).get_or_compute(1, "one", adding(1.0))
    TaskStore(tmp_path).get_or_compute(2, "two", adding(10.0))
    assert TaskStore(tmp_path).get_or_compute(2, "two", adding(5.0))["sum"] == 11.0
    assert TaskStore(tmp_path).get_or_compute(2, "another start", adding(5.0))["sum"] == 6.0
    assert TaskStore(tmp_path).get_or_compute(1, "another start", adding(7.0))["sum"] == 7.0


def test_a_run_does_not_begin_with_what_another_left(tmp_path):
    forget(tmp_path)
    TaskStore(tmp_path).get_or_compute(1, "one", adding(1.0))
    forget(tmp_path)
    assert TaskStore(tmp_path).get_or_compute(2, "two", adding(10.0))["sum"] == 10.0
    RoundStore(tmp_path, 1, 1).save("basis", {"sum": torch.ones(1)})
    forget(tmp_path)
    assert RoundStore(tmp_path, 1, 2).load("basis") == {}
    RoundStore(tmp_path, 1, 1, "feedback").save("basis", {"lost": torch.ones(1)})
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_first_round_of_this_run_left_is_not_forgotten(tmp_path):
    RoundStore(tmp_path, 0, 1).save("basis", {"sum": torch.ones(1)})
    RoundStore(tmp_path, 0, 1, "feedback").save("basis", {"lost": torch.ones(1)})
    forget(tmp_path)
    assert RoundStore(tmp_path, 0, 2).load("basis")["sum"] == 1.0
    assert RoundStore(tmp_path, 0, 2, "feedback").load("basis")["lost"] == 1.0


def carry(folder, task, server_round, number):
    RoundStore(folder, task, server_round).save("basis", {"sum": torch.tensor([float(number)])})


def test_a_round_finds_what_the_latest_before_it_in_its_task_left(tmp_path):
    folder = tmp_path / "site"
    assert RoundStore(folder, 1, 1).load("basis") == {}
    carry(folder, 1, 1, 10)
    carry(folder, 1, 4, 40)
    for again in range(2):  # round 4 is asked for again, after a crash
        assert RoundStore(folder, 1, 4).load("basis")["sum"] == 10
        carry(folder, 1, 4, 41 + again)
    assert RoundStore(folder, 1, 12).load("basis")["sum"] == 42
    assert RoundStore(folder, 1, 12).load("another start") == {}
    assert RoundStore(folder, 2, 1).load("basis") == {}


def test_the_folder_of_rounds_does_not_grow(tmp_path):
    for task in (1, 2):
        for server_round in range(1, 13):
            carry(tmp_path, task, server_round, 0)
            assert len(list(tmp_path.iterdir())) <= 2


def test_a_server_that_counts_far_does_not_hold_the_site_up(tmp_path):
    RoundStore(tmp_path, 1, 3).save("basis", {"sum": torch.ones(1)})
    assert RoundStore(tmp_path, 1, 2**62).load("basis")["sum"] == 1.0
    assert RoundStore(tmp_path, 11, 2**62).load("basis") == {}


PLACE = Instruction(task="triage", stage=0, server_round=1, rank=4, retained_rank=4)


def update(value):
    figures = {"num_examples": 4, "loss": 0.5, "seconds": 1.25}
    return LocalUpdate({"w": np.full((2, 3), value, np.float32)}, figures)


def test_a_request_that_comes_twice_gets_the_same_answer(tmp_path):
    first = update_once(tmp_path, "request 1", PLACE, lambda: update(1))
    again = update_once(tmp_path, "request 1", PLACE, pytest.fail)
    assert again.figures == first.figures == update(1).figures
    np.testing.assert_array_equal(again.arrays["w"], first.arrays["w"])
    other = update_once(
        tmp_path, "request 2", PLACE, lambda: update(2)
    )  # another start of the round
    assert other.arrays["w"][0, 0] == 2


def test_of_some_that_are_asked_at_once_one_makes_the_answer(tmp_path):
    """Else what another has left behind for the next round would be of a training that nobody was
    charged for."""
    made = []

    def slow():
        made.append(len(made) + 1)
        time.sleep(0.2)
        return update(made[-1])

    def ask(_):
        return float(update_once(tmp_path, "request", PLACE, slow).arrays["w"][0, 0])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [1.0] * 4
    assert made == [1]


def test_class_sums_that_two_runs_ask_for_at_once_are_given_once(tmp_path):
    """Else the server would have the same sums under two noises."""
    made = []

    def slow():
        made.append(len(made) + 1)
        time.sleep(0.2)
        return np.full(3, made[-1], np.int64)

    def ask(_):
        return int(sums_once(tmp_path / "sums", "triage", ("form", 1), slow)[0][0])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [1] * 4
    assert made == [1]


def test_a_torn_answer_is_made_again(tmp_path):
    update_once(tmp_path, "request 1", PLACE, lambda: update(1))
    (kept,) = tmp_path.glob("update-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:20])
    again = update_once(tmp_path, "request 1", PLACE, lambda: update(3))
    assert again.arrays["w"][0, 0] == 3


def test_an_answer_that_cannot_be_kept_is_not_given(tmp_path):
    (tmp_path / f"update-0-1.safetensors.{os.getpid()}.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        update_once(tmp_path, "request 1", PLACE, lambda: update(1))
    assert not list(tmp_path.glob("*.safetensors"))
