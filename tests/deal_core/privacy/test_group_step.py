"""A step where a group is the unit: what a group moves, who is drawn, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy import dpsgd
from deal_core.privacy.dpsgd import GRID_BITS, ClippedSum, Groups, PrivateGradients, clipped_total
from deal_core.privacy.guards import UnsafeModel
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SeededNoise
from deal_core.randomness import seeded
from tests.deal_core.privacy.silence import Silence
from tests.slow import slow_but

LABELS = ["red", "green", "blue"]
BOTH = frozenset({"lora_A", "lora_B"})
BOUND = 0.05
SIZES = (3, 1, 7, 2, 1, 5)
"""Records of the groups that are there in any case."""


@pytest.fixture(scope="module", params=["encoder", "llama"])
def model(request, make_causal, random_adapter, tmp_path_factory):
    """The encoder packs a pass end to end; the others pad."""
    config = ModelConfig()
    if request.param != "encoder":
        folder = make_causal(tmp_path_factory.mktemp(request.param), request.param)
        config = ModelConfig(family="causal-lm", name=str(folder))
    made = load_model(config, AdapterConfig(), 32, torch.float32)
    write(made.module, random_adapter(read(made.module).shapes, 8, 0.01, seed=5))
    return made


def texts(count: int, seed: str) -> list[Encoded]:
    generator = seeded(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [
        Encoded((1, *torch.randint(3, 20, (n,), generator=generator).tolist()), i % 3)
        for i, n in enumerate(lengths)
    ]


def numbers(sizes: Sequence[int]) -> list[int]:
    """Groups of these sizes, their records not in a row: dealt in turn."""
    left = list(sizes)
    found: list[int] = []
    while any(left):
        for number, size in enumerate(left):
            if size:
                found.append(number)
                left[number] -= 1
    return found


def source(data, groups, noise, **changes) -> PrivateGradients:
    given = {
        "sample_rate": 1.0,
        "noise_multiplier": 1.3,
        "max_grad_norm": BOUND,
        "steps": 3,
        "expected_batch": 1,
    }
    ids = [RecordId("task", row) for row in range(len(data))]
    return PrivateGradients(
        data=data, record_ids=ids, noise=noise, groups=Groups(groups), **{**given, **changes}
    )


def released(model, gradients: PrivateGradients, drawn: Sequence[int], scale=1.0) -> torch.Tensor:
    """The gradient, float32, by the mechanism's own way from the groups drawn."""
    parameters = set_trainable(model.module, BOTH)
    plain = Plain(model, LABELS, gradients.data)

    class Loud:
        def example_losses(self, batch):
            return plain.example_losses(batch) * scale

    gradients.accumulate(model.module, Loud(), gradients.groups.batch(drawn))
    row = torch.cat([p.grad.flatten().double() for p in parameters])
    for p in parameters:
        p.grad = None
    return row


def summed(model, gradients: PrivateGradients, drawn: Sequence[int], scale: float) -> torch.Tensor:
    """What noise is added to, by the same way: in steps of the grid, before float32 rounds it."""
    found: list[ClippedSum] = []

    def kept(*given, **named):
        found.append(clipped_total(*given, **named))
        return found[0]

    with patch.object(dpsgd, "clipped_total", kept):
        released(model, gradients, drawn, scale)
    zeros = torch.zeros(1, dtype=torch.int64)
    return torch.cat([zeros, *(part.flatten() for part in found[0].total.values())])


def square(steps: torch.Tensor) -> int:
    """The exact square of a length."""
    return sum(value * value for value in steps.tolist())


@pytest.mark.parametrize("size", slow_but([1, 2, 50], 1, 50))
@pytest.mark.parametrize("scale", slow_but([1e-8, 1.0, 1e6], 1.0))
def test_a_group_moves_the_sum_by_at_most_the_bound_whatever_its_size(model, size, scale):
    """Neighbouring data sets: one has a group more, of 1, 2 or 50 records. Exact, no tolerance."""
    there = numbers(SIZES)
    others = texts(len(there), "others")
    more = texts(size, "the group more")
    own = [*there, *([len(SIZES)] * size)]
    small = source(others, there, Silence())
    large = source([*others, *more], own, Silence())
    everybody = range(len(SIZES))
    without = summed(model, small, everybody, scale)
    alone = summed(model, large, [len(SIZES)], scale)
    assert square(alone) <= 4**GRID_BITS
    if scale > 1:
        assert square(alone) > 0.98 * 4**GRID_BITS  # not by clipping all away
    together = summed(model, large, [*everybody, len(SIZES)], scale)
    assert square(together - without) <= 4**GRID_BITS
    assert not released(model, large, [], scale).any()


def test_fifty_equal_records_move_the_sum_as_one_does(model):
    record = texts(1, "the record")[0]
    others = texts(len(numbers(SIZES)), "others")
    first = released(model, source([*others, record], [*numbers(SIZES), 6], Silence()), [6])
    many = source([*others, *[record] * 50], [*numbers(SIZES), *[6] * 50], Silence())
    torch.testing.assert_close(released(model, many, [6]), first, rtol=1e-4, atol=1e-7)


def test_equal_seeds_draw_equal_groups_whatever_their_sizes():
    """Who is drawn depends on the number of groups alone: not on what is in one."""
    one, other = numbers((1,) * 30), numbers((1,) * 29 + (50,))
    drawn = [
        [
            {groups[position] for position in batch}
            for batch in source(
                texts(len(groups), "x"), groups, SeededNoise(seeded("s")), sample_rate=0.3
            ).batches()
        ]
        for groups in (one, other)
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("batch", "reason"),
    [([0, 0], "twice"), ([0], "in part"), ([0, 2, 1], "in part"), ([0, 2, 1, 3], "more than")],
)
def test_a_batch_that_is_no_sample_of_groups_is_refused(model, batch, reason):
    data = texts(4, "four")
    set_trainable(model.module, BOTH)
    rare = source(data, [0, 1, 0, 1], Silence(), sample_rate=1e-9)
    with pytest.raises(UnsafeModel, match=reason):
        rare.accumulate(model.module, Plain(model, LABELS, data), batch)


def test_a_group_in_two_pieces_is_not_let_through(model):
    data = texts(4, "four")
    parameters = set_trainable(model.module, BOTH)
    whole = source(data, [0, 1, 0, 1], Silence())
    with pytest.raises(ValueError, match="follow each other"):
        whole.accumulate(model.module, Plain(model, LABELS, data), [0, 1, 2, 3])
    for parameter in parameters:
        parameter.grad = None


def test_groups_are_numbered_without_gaps():
    with pytest.raises(UnsafeModel, match="numbered from 0"):
        len(Groups([0, 2, 2]))
    assert len(Groups([])) == 0
