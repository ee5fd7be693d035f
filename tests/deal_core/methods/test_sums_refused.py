"""A sum that no data can have is refused, and rounding is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.lora.payload import PayloadError
from deal_core.methods import linear_probe as probe
from deal_core.methods.shared import class_sums
from deal_core.methods.shared.class_sums import without_negative
from deal_core.randomness import seeded
from tests.deal_core.methods.sums import (
    LABELS,
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
    collect = class_sums.collect if kind == "sums" else probe.collect
    return collect(embedded(x, y))


def times(name: str, factor: float):
    return lambda sums: sums | {name: factor * sums[name]}


def negated(sums):
    """A Gram matrix of the right trace that no data have."""
    size = SIZE
    matrix = class_sums.symmetric(sums["gram"], size)
    matrix = matrix - 3.0 * matrix.trace() / size * torch.eye(size, dtype=matrix.dtype)
    matrix = -matrix / 2.0
    assert abs(float(matrix.trace()) - float(sums["count"].sum())) < 1e-6
    rows, columns = torch.triu_indices(size, size)
    vector = torch.ones(size, dtype=matrix.dtype)
    matrix -= 50.0 * (torch.outer(vector, vector) - torch.eye(size, dtype=matrix.dtype))
    return sums | {"gram": matrix[rows, columns]}


def one_more(name: str, amount: float):
    def change(sums):
        value = sums[name].clone()
        value.view(-1)[0] += amount
        return sums | {name: value}

    return change


HOSTILE = {
    "half an example": ("sums", one_more("count", 0.5)),
    "fewer than none": ("sums", one_more("count", -1000.0)),
    "no example": ("sums", lambda sums: {name: 0 * value for name, value in sums.items()}),
    "vast count": ("sums", times("count", 1e9)),
    "long sum": ("sums", times("sum", 3.0)),
    "vast sum": ("sums", times("sum", 1e30)),
    "Gram of more examples": ("sums", times("gram", 1.01)),
    "negative Gram": ("sums", times("gram", -1.0)),
    "Gram of no data": ("sums", negated),
    "too little scatter": (
        "sums",
        lambda sums: (
            sums
            | {
                "sum": sums["count"][:, None]
                * 0.99
                * torch.nn.functional.one_hot(torch.zeros(LABELS, dtype=torch.long), SIZE)
            }
        ),
    ),
    "gradient of nobody": ("gradient", times("count", 0.0)),
    "long gradient": ("gradient", times("gradient", 1e6)),
    "unbalanced gradient": ("gradient", one_more("gradient", 5.0)),
    "half a gradient's example": ("gradient", one_more("count", 0.25)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sums_that_no_data_can_have_are_refused(kind):
    which, spoil = HOSTILE[kind]
    check = class_sums.check if which == "sums" else probe.check
    check(good(which))
    with pytest.raises(PayloadError):
        check(spoil(good(which)))


def test_negative_scatter_counts_as_none_and_other_matrices_stay_the_same_objects():
    x = torch.randn(40, SIZE, generator=seeded("x"), dtype=torch.float64)
    positive = x.T @ x / 40
    assert without_negative(positive) is positive
    assert without_negative(torch.zeros(SIZE, SIZE).double()).abs().max() == 0
    values, vectors = torch.linalg.eigh(positive)
    spoilt = (vectors * (values - values[3])) @ vectors.T
    repaired = (vectors * (values - values[3]).clamp(min=0.0)) @ vectors.T
    torch.testing.assert_close(without_negative(spoilt), repaired)


def test_what_passes_the_check_makes_finite_heads():
    """All examples equal: there is no scatter at all."""
    x = normalize(torch.ones(9, SIZE), dim=1)
    sums = class_sums.collect(embedded(x, torch.zeros(9, dtype=torch.long)))
    class_sums.check(sums)
    statistics = statistics_in(
        method_with(name="prototype", prototype={"covariance": "shared"}), "learn"
    )
    state = one_round(start(), statistics, {"skin": [(x, torch.zeros(9, dtype=torch.long))]})
    assert state.heads["skin"].isfinite().all()
    assert float(state.heads["skin"].abs().max()) < 1e10
