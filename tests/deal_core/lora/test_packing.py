"""Packed texts: the same numbers as padded ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.lora.linear import AdaptedLinear, WholeWeight
from deal_core.lora.packing import Packing
from deal_core.models import load_model
from deal_core.models.encoder import EncoderLabels
from deal_core.models.interface import Encoded
from deal_core.training.loop import mean_gradient
from tests.deal_core.training.clipped import clipped_gradients

LABELS = ["red", "green", "blue"]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(LENGTHS)
def test_apart_and_together_again(lengths: list[int]) -> None:
    packing = Packing(tuple(lengths))
    row = torch.arange(1.0, 2 * sum(lengths) + 1).view(-1, 2).requires_grad_()
    cells = packing.apart(row)
    assert cells.shape == (len(lengths), max(lengths), 2)
    for text, own, length in zip(cells, torch.split(row, lengths), lengths, strict=True):
        assert torch.equal(text[:length], own)
        assert not text[length:].any()
    assert torch.equal(packing.together(cells), row)
    packing.together(cells * 3).sum().backward()
    assert torch.equal(row.grad, torch.full_like(row, 3))
    assert [n for group in packing.groups for n in group.lengths] == lengths
    for group in packing.groups:
        assert len(group.lengths) * max(group.lengths) <= 1.1 * sum(group.lengths)
    places = [n for length in lengths for n in range(length)]
    assert packing.positions.tolist() == [places]


@pytest.fixture(scope="module")
def model(random_adapter) -> EncoderLabels:
    made = load_model(ModelConfig(), AdapterConfig(), 128, torch.float32)
    write(made.module, random_adapter(read(made.module).shapes, 8, 0.01, seed=5))
    assert isinstance(made, EncoderLabels)
    return made


def examples() -> list[Encoded]:
    """On both sides of the length up to which attention is our own."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(1000, 20000, (n,), generator=generator).tolist()  # noqa: E731
    return [Encoded((101, *draw(n), 102), n % 3) for n in (1, 90, 12, 30)]


def both_ways(model: EncoderLabels, compute):
    """What ``compute`` returns with padding, and with packing."""
    found = []
    try:
        for packs in (False, True):
            model.module.packs_texts = packs
            found.append(compute())
    finally:
        model.module.packs_texts = True
    return found


def far(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / one.norm())


def test_scores_are_those_of_padded_texts_and_of_each_alone(model: EncoderLabels) -> None:
    data = examples()
    with torch.no_grad():
        padded, packed = both_ways(model, lambda: model.scores(data, LABELS))
        alone = torch.cat([model.scores([item], LABELS) for item in data])
    assert far(padded, packed) < 1e-5
    assert far(alone, packed) < 1e-5
    assert len({tuple(row.tolist()) for row in packed}) == len(data)


def test_gradients_of_the_batch_and_of_every_example_are_those_of_padded_texts(
    model: EncoderLabels,
) -> None:
    data = examples()
    parameters = set_trainable(model.module, frozenset({"lora_A", "lora_B"}))
    objective = Plain(model, LABELS, data)

    def gradient(accumulate) -> torch.Tensor:
        accumulate()
        row = torch.cat([p.grad.flatten() for p in parameters])
        for p in parameters:
            p.grad = None
        return row

    def clipped() -> torch.Tensor:
        return clipped_gradients(model.module, objective, range(4), 0.5)

    for way in (lambda: mean_gradient(objective, data, range(4), 4096), clipped):
        padded, packed = both_ways(model, lambda way=way: gradient(way))
        assert far(padded, packed) < 1e-5
    norms = both_ways(model, clipped)
    assert far(*norms) < 1e-5


def test_a_packing_of_other_texts_gives_no_gradient_per_example() -> None:
    x, weight = torch.zeros(1, 7, 6), torch.zeros(4, 6)
    A, B = torch.zeros(2, 3, 6), torch.zeros(2, 4, 3)
    for lengths in ((3, 3), (7,), (3, 2, 2)):
        with pytest.raises(ValueError, match="mixes examples"):
            AdaptedLinear.apply(x, WholeWeight(weight), None, A, B, 1.0, Packing(lengths))
    assert AdaptedLinear.apply(x, WholeWeight(weight), None, A, B, 1.0, Packing((3, 4))).shape == (
        1,
        7,
        4,
    )
