"""What private steps are tested with: short texts, gradients without noise, groups."""

from collections.abc import Sequence

import torch

from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import Groups, PrivateGradients
from deal_core.privacy.interface import RecordId
from deal_core.randomness import seeded

LABELS = ["red", "green", "blue"]


class Silence:
    """No noise, and every record in every batch: what is left is the clipped sum."""

    def normal(self, shape):
        return torch.zeros(shape, dtype=torch.float64)

    def uniform(self, count):
        return torch.zeros(count, dtype=torch.float64)


def texts(count: int, seed: str = "texts") -> list[Encoded]:
    """Short texts of different lengths over the tiny model's words."""
    generator = seeded(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [
        Encoded((1, *torch.randint(3, 20, (n,), generator=generator).tolist()), i % 3)
        for i, n in enumerate(lengths)
    ]


def gradients(
    data: Sequence[Encoded], noise: object, groups: Sequence[int] | None = None, **changes: object
) -> PrivateGradients:
    """Private gradients as the mechanism makes them."""
    given = {
        "sample_rate": 1.0,
        "noise_multiplier": 1.3,
        "max_grad_norm": 0.7,
        "steps": 1,
        "expected_batch": 4,
        "groups": None if groups is None else Groups(groups),
    }
    ids = [RecordId("task", row) for row in range(len(data))]
    return PrivateGradients(data=data, record_ids=ids, noise=noise, **{**given, **changes})


def dealt(sizes: Sequence[int]) -> list[int]:
    """Groups of these sizes, their records not in a row: dealt in turn."""
    order = [(place, number) for number, size in enumerate(sizes) for place in range(size)]
    return [number for _, number in sorted(order)]
