"""Secure aggregation in whole runs: the same model as without it, and what the server is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deal_core.config.experiment import Experiment
from deal_core.lora.arrays import to_arrays
from deal_core.secure_sum.weighted import WEIGHT
from deal_core.wire.secure_layout import update_layout
from tests.simulations.run.secure_runs import (
    LEGS,
    POOLED,
    SHORT,
    Ran,
    leg_of,
    lost,
    rounds,
)

pytestmark = pytest.mark.usefixtures("one_model")

Arrays = Mapping[str, NDArray[np.float32]]
PLAIN = "aggregation.secure=false"
RULES: dict[str, tuple[str, ...]] = {
    "fedit": ("aggregation.rule=fedit",),
    "ffa": ("aggregation.rule=ffa",),
    "ffa-a, pooled": POOLED,
    "alternating": ("aggregation.rule=alternating",),
    "fedsvd": ("aggregation.rule=fedsvd",),
}


@pytest.fixture
def short(make_experiment):
    def make(*overrides: str) -> Experiment:
        return make_experiment(*SHORT, *overrides)

    return make


def tolerances(experiment: Experiment, ran: Ran, trained: frozenset[str]) -> tuple[float, float]:
    """How far an entry of a mean of factors may be from what it is without masks.

    Each of ``n`` sites rounds each of ``w x`` and ``w`` to a neighbour on its grid, so their sums
    are wrong by less than ``n`` steps, and the mean ``sum w x / sum w`` by less than
    ``n (step + |mean| weight step) / sum w``. The weights, examples over EXAMPLES, sum to 1 here.

    Returns:
        The first part, and the factor of ``|mean|`` in the second; twice the spacing of float32,
        in which both adapters are kept, is in both.
    """
    sites = experiment.federation.clients
    layout = update_layout(ran.state.current, trained, sites)
    steps = {each.name: 1 / (each.scale or 1) for each in layout.fields}
    step = max(value for name, value in steps.items() if name != WEIGHT)
    eps = 2 * float(np.finfo(np.float32).eps)
    return sites * step + eps, sites * steps[WEIGHT] + eps


def assert_same_factors(
    experiment: Experiment, one: Ran, two: Ran, trained: frozenset[str]
) -> None:
    added, times = tolerances(experiment, one, trained)
    first, second = one.factors, two.factors
    assert first.keys() == second.keys()
    for key, value in second.items():
        np.testing.assert_allclose(first[key], value, rtol=times, atol=added, err_msg=key)


def product(arrays: Arrays, layer: str) -> NDArray[np.float64]:
    a, b = (arrays[f"{layer}.{factor}.weight"].astype(float) for factor in ("lora_A", "lora_B"))
    return b @ a


def changed(one: Arrays, two: Arrays) -> float:
    """Largest difference of two adapters' factors."""
    return max(float(np.abs(one[key] - two[key]).max()) for key in two)


@pytest.mark.parametrize("clients", [3, 5])
@pytest.mark.parametrize("rule", RULES)
def test_a_secure_round_gives_what_a_plain_one_gives(short, tmp_path, rule, clients):
    asked = (*RULES[rule], f"federation.clients={clients}")
    experiment = short(*asked)
    secure = rounds(experiment, tmp_path / "secure")
    plain = rounds(short(*asked, PLAIN), tmp_path / "plain")
    assert secure.told("summed", "sites") == [clients]
    assert {key.partition(".")[0] for key in secure.seen} == {"site", "status", "secure", "metrics"}
    if rule != "fedsvd":
        factors = {"fedit": {"lora_A", "lora_B"}, "ffa-a, pooled": {"lora_A"}}
        trained = frozenset(factors.get(rule, {"lora_B"}))
        assert_same_factors(experiment, secure, plain, trained)
    else:  # an SVD of the mean may turn the factors, and not their product
        added, times = tolerances(experiment, secure, frozenset({"lora_B"}))
        one, two = secure.factors, plain.factors
        for key in [key for key in two if "lora_B" in key]:
            layer = key.removesuffix(".lora_B.weight")
            expected = product(two, layer)
            # B A with orthonormal rows of A: an error of B's entries, over its columns
            rank, width = two[f"{layer}.lora_A.weight"].shape
            error = np.sqrt(rank * width) * (added + times * float(np.abs(expected).max()))
            assert np.abs(product(one, layer) - expected).max() <= error
    moved = changed(to_arrays(plain.state.current), to_arrays(secure.state.current))
    assert moved < changed_at_all(plain) / 50  # the tolerances are far below what was learnt


def changed_at_all(ran: Ran) -> float:
    """Largest entry of what starts at zero."""
    return max(float(np.abs(value).max()) for key, value in ran.factors.items() if "lora_B" in key)


@pytest.mark.parametrize("leg", LEGS[1:])
def test_a_client_whose_reply_is_lost_costs_its_part_of_the_sum_or_nothing(short, tmp_path, leg):
    """Before its vector has come it is left out, as without masks; after that it counts."""
    asked = ("federation.clients=5", "federation.deadline_seconds=0.2", "aggregation.rule=ffa")
    secure = rounds(short(*asked), tmp_path / "secure", lost((leg, "3")))
    counts = leg in ("confirm", "unmask")
    missing = () if counts else (("mask", "3"),)
    plain = rounds(short(*asked, PLAIN), tmp_path / "plain", lost(*missing))
    whole = rounds(short(*asked, PLAIN), tmp_path / "whole") if missing else None
    assert secure.told("summed", "sites") == [5 if counts else 4]
    event = "leg_failed" if counts else "client_failed"
    assert secure.told(event, "client") == ["3"]
    assert secure.told(event, "reason") == ["no reply before the deadline"]
    assert_same_factors(short(*asked), secure, plain, frozenset({"lora_B"}))
    if whole is not None:  # and one client less is another model: the comparison can fail
        assert changed(secure.factors, whole.factors) > 1e-4


@pytest.mark.parametrize("leg", LEGS[1:])
def test_below_the_threshold_a_round_is_lost_and_the_run_goes_on(short, tmp_path, leg):
    """Four clients, one of whom may collude: three are needed."""
    asked = (
        "federation.clients=4", "federation.deadline_seconds=1", "federation.quorum=0.5",
        "federation.rounds=2",
    )  # fmt: skip
    drops, fails = lost((leg, "1"), (leg, "2")), {"on": True}

    def first_round_alone(reply):
        return drops(reply) if fails["on"] else reply

    experiment = short(*asked)
    begun = rounds(experiment, tmp_path / "run", first_round_alone)
    (reason,) = begun.told("round_lost", "reason")
    assert "below the 3 that a sum needs" in reason or "below the threshold of 3" in reason
    before = changed_at_all(begun)
    assert before == 0
    fails["on"] = False
    after = rounds(experiment, tmp_path / "run", first_round_alone, last=2)
    assert after.told("summed", "sites") == [4]
    assert changed_at_all(after) > 0


def test_a_round_with_fewer_clients_than_the_quorum_stops_as_any_round_does(short, tmp_path):
    asked = ("federation.clients=4", "federation.deadline_seconds=1")
    with pytest.raises(ValueError, match="the quorum is"):
        rounds(short(*asked), tmp_path, lost(*(("prepare", client) for client in "012")))


def test_what_the_server_holds_of_clients_are_words_of_the_ring(short, tmp_path):
    """Two runs of the same seed give the same model, and every masked vector is another."""
    vectors: dict[str, list[bytes]] = {"one": [], "two": []}
    made: list[Any] = []
    for name, kept in vectors.items():

        def see(reply, kept=kept):
            if leg_of(reply) == "mask":
                kept.append(reply.content["secure"]["reply"])
            return reply

        made.append(rounds(short("federation.clients=3"), tmp_path / name, see).factors)
    assert all(np.array_equal(made[0][key], made[1][key]) for key in made[0])
    bytes_of = [np.frombuffer(v, np.uint8) for both in vectors.values() for v in both]
    assert len({each.tobytes() for each in bytes_of}) == 6
    for one in range(6):
        for two in range(one):
            alike = float((bytes_of[one][64:] == bytes_of[two][64:]).mean())
            assert alike < 0.01  # 1 in 256 by chance


def test_the_error_of_a_mean_of_both_factors_is_not_known_and_not_said_to_be_none(short, tmp_path):
    asked = ("federation.clients=3",)
    both = rounds(short(*asked, "aggregation.rule=fedit"), tmp_path / "both")
    one = rounds(short(*asked, "aggregation.rule=ffa"), tmp_path / "one")
    assert both.told("round_finished", "aggregation_error") == [None]
    assert one.told("round_finished", "aggregation_error")[0] < 1e-6
