"""Whether a private training fails may tell what the noised gradients of records were."""

import pytest
import torch

from client import runtime
from client.state import RoundStore
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.state import State
from deal_core.privacy.ledger import Ledger
from tests.client.real_site import RealSite, code, start
from tests.client.real_site import small as asked

pytestmark = pytest.mark.usefixtures("one_model")

HARDLY = asked("train.learning_rate=1e-6", "privacy.target_epsilon=1")


def heavy():
    """A crafted model: numbers so large that a small step is lost in rounding, so that nothing
    moves but where an attacker wants it to."""
    begun = start(HARDLY)
    layers = {
        name: LoraFactors(factors.A, torch.full_like(factors.B, 1000.0))
        for name, factors in begun.current.layers.items()
    }
    return State(Adapter(layers, begun.current.scaling), begun.retained)


def test_a_training_that_fails_on_noise_as_well_is_charged_as_long_as_the_budget_allows(tmp_path):
    site = RealSite(tmp_path)
    assert [code(site.answer(HARDLY, {}, heavy())) for _ in range(2)] == ["failed", "failed"]
    assert len(site.events) == 1
    codes = [code(site.answer(HARDLY, {"server_round": n}, heavy())) for n in range(2, 10)]
    assert codes[-1] == "budget-spent"
    assert len(site.events) == 1 + codes.count("failed")


def test_what_fails_before_a_record_is_read_costs_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("this model cannot be trained here")

    site = RealSite(tmp_path)
    monkeypatch.setattr(runtime, "set_trainable", broken)
    assert code(site.answer(HARDLY, {})) == "failed"
    assert site.events == []


def test_nothing_is_carried_on_of_an_update_that_was_not_charged(tmp_path, monkeypatch):
    """What a lossy format has cut off follows from the noised training: the next round would send
    it, though the ledger has nothing of this one."""
    saved = []
    save, charge = RoundStore.save, Ledger.charge

    def watched(self, *given):
        saved.append(given)
        save(self, *given)

    def crashes(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(RoundStore, "save", watched)
    monkeypatch.setattr(Ledger, "charge", crashes)
    small = asked("wire.dtype=int8", "privacy.target_epsilon=1")
    site = RealSite(tmp_path)
    assert code(site.answer(small, {})) == "failed"
    assert (site.events, saved) == ([], [])
    monkeypatch.setattr(Ledger, "charge", charge)
    assert code(site.answer(small, {})) == "ok"
    assert (len(site.events), len(saved)) == (1, 1)
