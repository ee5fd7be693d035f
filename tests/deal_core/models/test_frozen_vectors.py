"""Vectors of an encoder that never changes: made once, in any order, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deal_core.models.fast.text_cache import FrozenVectors, weights_name

TEXTS = [(1, 2, 3), (4,), (1, 2), tuple(range(50))]


def embed(texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor([[float(sum(ids)), float(len(ids))] for ids in texts])


class Counted:
    """Embeds, and counts what it was asked for."""

    def __init__(self) -> None:
        self.texts: list[tuple[int, ...]] = []

    def __call__(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        assert len(texts) == 1  # beside others a text is rounded otherwise
        self.texts += texts
        return embed(texts)


def test_each_text_has_its_own_vector_and_is_embedded_once():
    counted = Counted()
    vectors = FrozenVectors(counted, lambda: "model")
    assert torch.equal(vectors([*TEXTS, TEXTS[0]]), embed([*TEXTS, TEXTS[0]]))
    assert torch.equal(vectors(TEXTS[::-1]), embed(TEXTS[::-1]))
    assert sorted(counted.texts) == sorted(TEXTS)


def test_the_next_process_reads_them_unless_the_model_is_another(tmp_path):
    FrozenVectors(embed, lambda: "model").prepare(TEXTS, tmp_path)
    counted = Counted()
    again = FrozenVectors(counted, lambda: "model")
    again.prepare(TEXTS, tmp_path)
    assert torch.equal(again(TEXTS), embed(TEXTS))
    assert not counted.texts
    FrozenVectors(counted, lambda: "another").prepare(TEXTS, tmp_path)
    assert sorted(counted.texts) == sorted(TEXTS)
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_a_damaged_file_is_made_anew(tmp_path):
    FrozenVectors(embed, lambda: "model").prepare(TEXTS, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no vectors")
    again = FrozenVectors(embed, lambda: "model")
    again.prepare(TEXTS, tmp_path)
    assert torch.equal(again(TEXTS), embed(TEXTS))


def test_without_a_folder_nobody_asks_for_the_name():
    def name() -> str:
        raise AssertionError("takes a pass over all weights")

    assert torch.equal(FrozenVectors(embed, name)(TEXTS), embed(TEXTS))


def test_other_weights_or_settings_have_another_name():
    weights = {"a": torch.ones(3), "b": torch.zeros(2)}
    names = {
        weights_name(weights, "cpu"),
        weights_name(weights, "cuda"),
        weights_name({**weights, "b": torch.ones(2)}, "cpu"),
        weights_name({"a": torch.ones(3)}, "cpu"),
    }
    assert len(names) == 4
    assert weights_name(dict(weights), "cpu") in names
