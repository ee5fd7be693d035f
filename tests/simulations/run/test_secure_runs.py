"""Secure aggregation in whole runs: the same model as without it, and what the server is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deal_core.config.experiment import Experiment
from tests.simulations.run.secure_compare import (
    PLAIN,
    RULES,
    assert_same_factors,
    assert_same_model,
    changed,
    changed_at_all,
)
from tests.simulations.run.secure_runs import LEGS, SHORT, leg_of, lost, rounds
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def short(make_experiment):
    def make(*overrides: str) -> Experiment:
        return make_experiment(*SHORT, *overrides)

    return make


@pytest.mark.parametrize("clients", slow_but([3, 5], 3))
@pytest.mark.parametrize("rule", slow_but(RULES, "ffa-a, pooled"))
def test_a_secure_round_gives_what_a_plain_one_gives(short, tmp_path, rule, clients):
    asked = (*RULES[rule], f"federation.clients={clients}")
    experiment = short(*asked)
    secure = rounds(experiment, tmp_path / "secure")
    plain = rounds(short(*asked, PLAIN), tmp_path / "plain")
    assert secure.told("summed", "sites") == [clients]
    assert {key.partition(".")[0] for key in secure.seen} == {"site", "status", "secure", "metrics"}
    assert_same_model(experiment, secure, plain, rule)


@pytest.mark.slow
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


@pytest.mark.parametrize("leg", slow_but(LEGS[1:], "mask"))
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


@pytest.mark.slow
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
