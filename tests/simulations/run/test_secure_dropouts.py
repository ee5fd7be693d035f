"""Clients that drop out of a secure sum: the model is that of the plain sum of those in it."""

from __future__ import annotations

import pytest

from deal_core.secure_sum import keys as masks
from tests.simulations.run.secure_compare import (
    PLAIN,
    RULES,
    assert_same_model,
    changed,
    changed_at_all,
)
from tests.simulations.run.secure_runs import POOLED, SHORT, Ran, lost, rounds
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

FIVE = (
    "federation.clients=5", "federation.deadline_seconds=0.2", "privacy.colluding=0",
)  # fmt: skip
BEFORE, AFTER = ("mask", "3"), ("confirm", "1")
"""A client whose vector does not come, and one that is gone when it has come."""
SERVER_STEPS = ("privacy.dropouts=1", "train.step=server", "method.distillation.weight=0.0")
KINDS = {
    "pooled": (*POOLED, *SERVER_STEPS),
    "lora": ("aggregation.rule=ffa", *SERVER_STEPS),
}


class NoMask:
    """In the place of a stream: what a site sends is its plain vector."""

    def update_into(self, still: memoryview, buffer: bytearray) -> None:
        """Write zeros."""
        buffer[: len(still)] = bytes(len(still))


def compared(make_experiment, folder, rule: str, legs: list[tuple[str, str]]) -> tuple[Ran, Ran]:
    """A round in which replies are lost, and a plain one of the clients whose vectors are in it."""
    asked = (*SHORT, *RULES[rule], *FIVE)
    experiment = make_experiment(*asked)
    secure = rounds(experiment, folder / "secure", lost(*legs))
    before = [("mask", client) for leg, client in legs if leg != AFTER[0]]
    plain = rounds(make_experiment(*asked, PLAIN), folder / "plain", lost(*before))
    assert secure.told("summed", "sites") == [5 - len(before)]
    assert secure.told("client_failed", "client") == [client for _, client in before]
    assert_same_model(experiment, secure, plain, rule)
    return secure, plain


@pytest.mark.parametrize("rule", slow_but(RULES, "ffa"))
def test_one_is_gone_before_masking_and_another_after_it(make_experiment, tmp_path, rule):
    secure, plain = compared(make_experiment, tmp_path, rule, [BEFORE, AFTER])
    assert secure.told("leg_failed", "client") == [AFTER[1]]
    # One client less is another model, by far more than masks cost: the comparison can fail.
    whole = rounds(make_experiment(*SHORT, *RULES[rule], *FIVE, PLAIN), tmp_path / "whole")
    off = changed(secure.factors, plain.factors)
    assert changed(secure.factors, whole.factors) > 100 * off


@pytest.mark.slow
@pytest.mark.parametrize("legs", [[], [BEFORE, AFTER]], ids=["all are there", "two drop out"])
def test_in_two_rounds_the_factor_moves_as_without_masks(make_experiment, tmp_path, legs):
    """Replies are lost in both rounds. AdamW divides by small gradients, and so enlarges in the
    second what masks have cost in the first."""
    asked = (*SHORT, *RULES["ffa"], *FIVE, "federation.rounds=2")
    plainly = make_experiment(*asked, PLAIN)
    secure = rounds(make_experiment(*asked), tmp_path / "secure", lost(*legs), last=2)
    plain = rounds(plainly, tmp_path / "plain", lost(*legs[:1]), last=2)
    once = rounds(plainly, tmp_path / "once", lost(*legs[:1]))
    assert secure.told("summed", "sites") == 2 * [5 - len(legs[:1])]
    assert changed(secure.factors, plain.factors) < changed(once.factors, plain.factors) / 50
    assert changed_at_all(plain) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_gradients_are_those_of_plain_vectors_to_the_bit(
    make_experiment, tmp_path, monkeypatch, kind
):
    """Whole numbers. Steps at the server have no run without the protocol: its streams are zero."""
    experiment = make_experiment(*SHORT, *FIVE, *KINDS[kind])
    secure = rounds(experiment, tmp_path / "secure", lost(BEFORE, AFTER))
    keys: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(masks, "mask_stream", lambda key: keys.append(key) or NoMask())
        plain = rounds(experiment, tmp_path / "plain", lost(BEFORE))
    assert secure.told("summed", "sites") == plain.told("summed", "sites") == [4]
    assert changed(secure.factors, plain.factors) == 0
    assert keys
    whole = rounds(experiment, tmp_path / "whole")
    assert changed(secure.factors, whole.factors) > 0
