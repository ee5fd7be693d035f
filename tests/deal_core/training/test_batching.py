from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from deal_core.models.interface import Encoded
from deal_core.randomness import seeded
from deal_core.training.loop import training_batches, within_budget

LENGTHS = st.lists(st.integers(1, 600), max_size=120)


def texts(lengths: list[int]) -> list[Encoded]:
    return [Encoded((7,) * length, 0) for length in lengths]


@given(LENGTHS, st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_has_every_example_once_in_full_batches(lengths, batch_size, seed):
    batches = training_batches(texts(lengths), batch_size, seeded(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert len(batches) <= len(lengths) // batch_size + 1


def test_batches_have_similar_lengths():
    lengths = torch.randint(1, 100, (1600,), generator=seeded("lengths")).tolist()
    whole = torch.tensor(lengths).float().std()

    batches = training_batches(texts(lengths), 16, seeded(1))
    spreads = [torch.tensor([lengths[i] for i in batch]).float().std() for batch in batches]
    assert torch.stack(spreads).mean() < 0.1 * whole


@given(LENGTHS, st.integers(1, 1000), st.none() | st.integers(0, 500))
def test_passes_keep_the_order_and_the_budget(lengths, tokens, waste):
    data = texts(lengths)
    passes = within_budget(data, range(len(data)), tokens, waste)
    assert [i for part in passes for i in part] == list(range(len(data)))
    for part in passes:
        padded = len(part) * max(lengths[i] for i in part)
        assert padded <= tokens or len(part) == 1
        assert waste is None or padded - sum(lengths[i] for i in part) <= waste
