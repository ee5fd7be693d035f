"""What a client may say of its privacy, and what nobody can mean."""

from __future__ import annotations

import pytest

from server.spending import extent, spending_in

GOOD = {"epsilon": 1.0, "delta": 1e-4, "simulation_only": 1.0, "noise_floor": 0.1}


def test_it_is_read_from_among_other_figures():
    spent = spending_in({**GOOD, "loss": 0.5})
    assert spent is not None
    assert (spent.epsilon, spent.simulation_only, spent.disjoint_tasks) == (1.0, True, False)
    parallel = spending_in({**GOOD, "disjoint_tasks": 1.0})
    assert parallel is not None
    assert extent(parallel.disjoint_tasks) != extent(spent.disjoint_tasks)


def test_who_keeps_it_says_none():
    assert spending_in({"simulation_only": 0.0, "noise_floor": 0.1}) is None


@pytest.mark.parametrize(
    "lie",
    [
        {"simulation_only": 0.5},
        {"disjoint_tasks": -1.0},
        {"epsilon": -1.0},
        {"delta": 2.0},
        {"noise_floor": -0.1},
        {"noise_floor": 1e200},
    ],
)
def test_what_cannot_be_is_refused(lie):
    with pytest.raises(ValueError, match=next(iter(lie))):
        spending_in({**GOOD, **lie})


@pytest.mark.parametrize(
    "said",
    [
        {"epsilon"},
        {"delta"},
        {"epsilon", "delta", "noise_floor"},
    ],
)
def test_half_of_it_is_refused(said):
    with pytest.raises(ValueError, match="Field required"):
        spending_in({name: GOOD[name] for name in said})
