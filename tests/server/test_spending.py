"""What a client may say of its privacy, and what nobody can mean."""

from __future__ import annotations

import pytest

from server.results import EARLIER, MORE_TRUST, VOID, Privacy, rounded_up, spending_in

GOOD = {"epsilon": 1.0, "delta": 1e-4, "simulation_only": 1.0}


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (7.9946, 3, "8"),
        (1.24e-5, 2, "1.3e-05"),
        (1e-5, 2, "1e-05"),
        (0.0, 3, "0"),
        (8.0, 3, "8"),
        (2.341, 3, "2.35"),
        (2.34, 3, "2.34"),
        (123.4, 3, "124"),
    ],
)
def test_what_is_shown_as_at_most_is_no_smaller(value, digits, shown):
    assert rounded_up(value, digits) == shown
    assert float(shown) >= value


def test_an_epsilon_says_for_whom_it_is_the_largest_and_when_it_is_void():
    known = {"mechanism": "record", "unit": "record", "assumes": "nobody", "delta": 1e-4}
    plain = Privacy(**known, epsilon={"0": 1.0, "1": 2.0}, metrics="none")
    over = f"over all rounds and tasks{EARLIER}"
    assert (
        plain.meaning
        == f"at delta = 0.0001 per record, {over} (largest over clients, as last told); nobody"
    )
    more = plain.model_copy(
        update={"silent": 3, "void": True, "assumes_more": True, "simulation_only": True}
    )
    for part in ("the 2 of 5 clients that tell", VOID, f"nobody, {MORE_TRUST}", "simulation only"):
        assert part in more.meaning
    clear = plain.model_copy(update={"metrics": "clear"})
    assert "counts of right answers on test records may leave in the clear" in clear.meaning


@pytest.mark.parametrize(
    "lie",
    [
        {"simulation_only": 0.5},
        {"disjoint_tasks": -1.0},
        {"void": 0.5},
        {"assumes_more": 2.0},
        {"epsilon": -1.0},
        {"delta": 2.0},
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
        {"epsilon", "delta"},
    ],
)
def test_half_of_it_is_refused(said):
    with pytest.raises(ValueError, match="Field required"):
        spending_in({name: GOOD[name] for name in said})
