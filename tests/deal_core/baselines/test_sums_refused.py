"""A sum that no data can have is refused, and rounding is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.baselines import frozen as probe
from deal_core.lora.payload import PayloadError
from tests.deal_core.deal.sums import (
    SIZE,
    data,
    embedded,
    method_with,
    one_round,
    start,
    statistics_in,
)


def good(kind: str) -> dict[str, Tensor]:
    x, y = data(7)
    collect = probe.collect_moment if kind == "moment" else probe.collect
    return collect(embedded(x, y))


def times(name: str, factor: float):
    return lambda sums: sums | {name: factor * sums[name]}


def negated(sums):
    """A moment of the right trace that no data have."""
    matrix = probe.symmetric(sums["moment"])
    identity = torch.eye(SIZE + 1, dtype=matrix.dtype)
    matrix -= 50.0 * (torch.ones_like(matrix) - identity)
    rows, columns = torch.triu_indices(SIZE + 1, SIZE + 1)
    return sums | {"moment": matrix[rows, columns]}


def one_more(name: str, amount: float):
    def change(sums):
        value = sums[name].clone()
        value.view(-1)[0] += amount
        return sums | {name: value}

    return change


HOSTILE = {
    "half an example": ("moment", one_more("count", 0.5)),
    "fewer than none": ("moment", one_more("count", -1000.0)),
    "no example": ("moment", lambda sums: {name: 0 * value for name, value in sums.items()}),
    "vast count": ("moment", times("count", 1e9)),
    "moment of more examples": ("moment", times("moment", 1.01)),
    "vast moment": ("moment", times("moment", 1e30)),
    "negative moment": ("moment", times("moment", -1.0)),
    "moment of no data": ("moment", negated),
    "an example that is not counted": ("moment", one_more("count", 1.0)),
    "gradient of nobody": ("gradient", times("count", 0.0)),
    "long gradient": ("gradient", times("gradient", 1e6)),
    "unbalanced gradient": ("gradient", one_more("gradient", 5.0)),
    "half a gradient's example": ("gradient", one_more("count", 0.25)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sums_that_no_data_can_have_are_refused(kind):
    which, spoil = HOSTILE[kind]
    check = probe.check_moment if which == "moment" else probe.check
    check(good(which))
    with pytest.raises(PayloadError):
        check(spoil(good(which)))


def test_what_passes_the_check_makes_finite_heads():
    """All examples equal: there is no scatter at all."""
    x = normalize(torch.ones(9, SIZE), dim=1)
    tasks = {"skin": [(x, torch.zeros(9, dtype=torch.long))]}
    method = method_with(name="linear-probe")
    state = one_round(start(), statistics_in(method, "learn"), tasks)
    state = one_round(state, statistics_in(method, "probe"), tasks)
    assert state.heads["skin"].isfinite().all()
    assert float(state.heads["skin"].abs().max()) < 1e10
