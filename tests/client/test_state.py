from __future__ import annotations

import numpy as np

from client.state import FeedbackStore, digest

LOST = {"first": np.ones((2, 3), np.float32)}


def test_a_round_finds_what_the_round_before_lost(tmp_path):
    store = FeedbackStore(tmp_path / "site")
    assert store.load(0, 1, "basis") == {}
    store.save(0, 1, "basis", LOST)
    assert np.array_equal(store.load(0, 2, "basis")["first"], LOST["first"])


def test_a_repeated_round_finds_the_same_again(tmp_path):
    store = FeedbackStore(tmp_path)
    store.save(0, 1, "basis", LOST)
    store.save(0, 2, "basis", {"first": 2 * LOST["first"]})
    assert np.array_equal(store.load(0, 2, "basis")["first"], LOST["first"])


def test_nothing_crosses_a_task_or_a_change_of_basis(tmp_path):
    store = FeedbackStore(tmp_path)
    store.save(0, 1, "basis", LOST)
    assert store.load(1, 1, "basis") == {}
    assert store.load(0, 2, "another basis") == {}


def test_the_folder_does_not_grow(tmp_path):
    store = FeedbackStore(tmp_path)
    for number in range(1, 6):
        store.save(0, number, "basis", LOST)
    store.save(1, 1, "basis", LOST)
    assert len(list(tmp_path.iterdir())) == 1


def test_digest_tells_values_apart():
    assert digest(LOST) == digest({"first": np.ones((2, 3), np.float32)})
    assert digest(LOST) != digest({"first": np.zeros((2, 3), np.float32)})
