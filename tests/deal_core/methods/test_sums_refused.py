"""A sum that no data can have is refused, and rounding is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.method import PrototypeConfig
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


IMPOSSIBLE = [kind for kind, (which, _) in HOSTILE.items() if which == "sums"]


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_room_for_rounding_is_none_for_sums_that_no_data_can_have(kind):
    class_sums.check_rounded(class_sums.with_scatter(good("sums")))
    with pytest.raises(PayloadError):
        class_sums.check_rounded(class_sums.with_scatter(HOSTILE[kind][1](good("sums"))))


def with_scatter_below(amount: float) -> dict[str, Tensor]:
    """What travels, with the least eigenvalue of the scatter so far below 0, the trace right."""
    sent = class_sums.with_scatter(class_sums.collect(embedded(*data(7))))
    values, vectors = torch.linalg.eigh(class_sums.symmetric(sent["scatter"], SIZE))
    values[-1] += values[0] + amount
    values[0] = -amount
    return sent | {"scatter": class_sums.triangle((vectors * values) @ vectors.T)}


def test_room_for_negative_scatter_is_as_wide_as_stated_and_no_wider():
    trace = class_sums.symmetric(with_scatter_below(0.0)["scatter"], SIZE).trace()
    class_sums.check_rounded(with_scatter_below(0.99 * float(trace) / 254))
    with pytest.raises(PayloadError, match="less scatter"):
        class_sums.check_rounded(with_scatter_below(1.01 * float(trace) / 254))


def test_negative_scatter_takes_nothing_away_from_what_others_sent():
    trace = float(class_sums.symmetric(with_scatter_below(0.0)["scatter"], SIZE).trace())
    sent = with_scatter_below(0.99 * trace / 254)
    class_sums.check_rounded(sent)
    sums = class_sums.with_gram(sent)
    gram = class_sums.symmetric(sums["gram"], SIZE)
    within = class_sums.scatter(sums["count"], sums["sum"], gram)
    assert float(torch.linalg.eigvalsh(within).min()) > -1e-9


def test_room_for_the_trace_is_as_wide_as_stated_and_no_wider():
    sent = class_sums.with_scatter(class_sums.collect(embedded(*data(7))))
    count, total = sent["count"], sent["sum"]
    off = SIZE**0.5 * total.abs().amax(dim=1) / 254
    room = float((off * (2 * total.norm(dim=1) + off) / count).sum()) / float(count.sum())
    share = float(class_sums.symmetric(sent["scatter"], SIZE).trace()) / float(count.sum())
    assert 2e-3 < room < 0.05
    for factor in (1.0 + 0.9 * room / share, 1.0 - 0.9 * room / share):
        class_sums.check_rounded(sent | {"scatter": factor * sent["scatter"]})
    for factor in (1.0 + 1.2 * room / share, 1.0 - 1.2 * room / share):
        with pytest.raises(PayloadError, match="trace"):
            class_sums.check_rounded(sent | {"scatter": factor * sent["scatter"]})


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
    statistics = statistics_in(method_with(name="prototype"), "learn")
    state = statistics.absorb(start(), {"skin": sums})
    assert state.heads["skin"].isfinite().all()
    assert float(state.heads["skin"].abs().max()) < 1e10
    assert PrototypeConfig().covariance == "shared"
