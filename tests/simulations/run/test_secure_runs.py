"""Secure aggregation in whole runs: the model of the plain sum of those in it, whoever drops out,
and what the server is shown."""

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from deal_core.secure_sum import keys as masks
from deal_core.wire.secure_layout import LOSS, layout_of
from tests.simulations.run.secure_runs import EXCHANGES, POOLED, SHORT, exchange_of, lost, rounds
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

Arrays = Mapping[str, NDArray[np.float32]]
PLAIN = "aggregation.secure=false"
RULES = {
    "fedit": ("aggregation.rule=fedit",),
    "ffa": ("aggregation.rule=ffa",),
    "ffa-a, pooled": POOLED,
}
TRAINED = {"fedit": frozenset({"lora_A", "lora_B"}), "ffa-a, pooled": frozenset({"lora_A"})}
"""Of all other rules ``lora_B``."""


def assert_same_model(experiment, secure, plain, rule):
    """After one round of a rule; what is allowed is far below what was learnt."""
    allowed = tolerance(experiment, secure, TRAINED.get(rule, frozenset({"lora_B"})))
    first, second = secure.factors, plain.factors
    assert first.keys() == second.keys()
    for key, value in second.items():
        np.testing.assert_allclose(first[key], value, rtol=1e-6, atol=allowed, err_msg=key)
    assert changed(secure.factors, plain.factors) < changed_at_all(plain) / 50


def tolerance(experiment, ran, trained):
    """How far an entry of a mean of factors may be from what it is without masks.

    Each of ``n`` sites rounds ``x`` to a neighbour on its grid, so the sum is wrong by less than
    ``n`` steps, and the mean by less than ``n / (n - 1)`` where one is gone. Twice the spacing of
    float32, in which both adapters are kept, is added.
    """
    sites = experiment.federation.clients
    layout = layout_of(experiment, ran.state.current, trained, gradients=False, basis="")
    step = max(1 / (each.scale or 1) for each in layout.fields if not each.name.startswith(LOSS))
    return sites / (sites - 1) * step + 2 * float(np.finfo(np.float32).eps)


def changed(one, two):
    """Largest difference of two adapters' factors."""
    return max(float(np.abs(one[key] - two[key]).max()) for key in two)


def changed_at_all(ran):
    """Largest entry of what starts at zero."""
    return max(float(np.abs(value).max()) for key, value in ran.factors.items() if "lora_B" in key)


@pytest.fixture
def short(make_experiment):
    def make(*overrides):
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


FIVE = (
    "federation.clients=5", "federation.deadline_seconds=0.2", "privacy.colluding=0",
)  # fmt: skip
EARLY = [("mask", "3"), ("confirm", "1")]
LATE = [("prepare", "3"), ("unmask", "1")]
"""A client whose vector does not come, and one that is gone when it has come."""


@pytest.mark.parametrize(
    ("rule", "exchanges"),
    [
        ("ffa", EARLY),
        *(pytest.param(rule, EARLY, marks=pytest.mark.slow) for rule in RULES if rule != "ffa"),
        pytest.param("ffa", LATE, marks=pytest.mark.slow),
    ],
)
def test_one_is_gone_before_masking_and_another_after_it(short, tmp_path, rule, exchanges):
    asked = (*RULES[rule], *FIVE)
    before, after = exchanges
    secure = rounds(short(*asked), tmp_path / "secure", lost(*exchanges))
    plain = rounds(short(*asked, PLAIN), tmp_path / "plain", lost(("mask", before[1])))
    assert secure.told("summed", "sites") == [4]
    assert secure.told("client_failed", "client") == [before[1]]
    assert secure.told("exchange_failed", "client") == [after[1]]
    assert secure.told("exchange_failed", "reason") == ["no reply before the deadline"]
    assert_same_model(short(*asked), secure, plain, rule)
    # One client less is another model, by far more than masks cost: the comparison can fail.
    whole = rounds(short(*asked, PLAIN), tmp_path / "whole")
    off = changed(secure.factors, plain.factors)
    assert changed(secure.factors, whole.factors) > 100 * off


SERVER_STEPS = ("privacy.dropouts=1", "train.step=server", "method.distillation.weight=0.0")
KINDS = {
    "pooled": (*POOLED, *SERVER_STEPS),
    "lora": ("aggregation.rule=ffa", *SERVER_STEPS),
}


class NoMask:
    """In the place of a stream: what a site sends is its plain vector."""

    def update_into(self, still, buffer):
        """Write zeros."""
        buffer[: len(still)] = bytes(len(still))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_gradients_are_those_of_plain_vectors_to_the_bit(
    short, tmp_path, monkeypatch, kind
):
    """Whole numbers. Steps at the server have no run without the protocol: its streams are zero."""
    experiment = short(*FIVE, *KINDS[kind])
    secure = rounds(experiment, tmp_path / "secure", lost(*EARLY))
    keys = []
    with monkeypatch.context() as patch:
        patch.setattr(masks, "mask_stream", lambda key: keys.append(key) or NoMask())
        plain = rounds(experiment, tmp_path / "plain", lost(EARLY[0]))
    assert secure.told("summed", "sites") == plain.told("summed", "sites") == [4]
    assert changed(secure.factors, plain.factors) == 0
    assert keys
    whole = rounds(experiment, tmp_path / "whole")
    assert changed(secure.factors, whole.factors) > 0


@pytest.mark.parametrize("exchange", slow_but(EXCHANGES[1:], "mask"))
def test_below_the_threshold_a_round_is_lost_and_the_run_goes_on(short, tmp_path, exchange):
    """Four clients, one of whom may collude: three are needed."""
    asked = (
        "federation.clients=4", "federation.deadline_seconds=0.3", "federation.quorum=0.5",
        "federation.rounds=2",
    )  # fmt: skip
    drops, fails = lost((exchange, "1"), (exchange, "2")), {"on": True}

    def first_round_alone(reply):
        return drops(reply) if fails["on"] else reply

    experiment = short(*asked)
    begun = rounds(experiment, tmp_path / "run", first_round_alone)
    (reason,) = begun.told("round_lost", "reason")
    assert "below the 3 that a sum needs" in reason
    before = changed_at_all(begun)
    assert before == 0
    fails["on"] = False
    after = rounds(experiment, tmp_path / "run", first_round_alone, last=2)
    assert after.told("summed", "sites") == [4]
    assert changed_at_all(after) > 0


def test_what_the_server_holds_of_clients_are_words_of_the_ring(short, tmp_path):
    """Two runs of the same seed give the same model, and every masked vector is another."""
    vectors = {"one": [], "two": []}
    made = []
    for name, kept in vectors.items():

        def see(reply, kept=kept):
            if exchange_of(reply) == "mask":
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
