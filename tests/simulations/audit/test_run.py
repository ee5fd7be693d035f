"""Audited trainings: real apps, real mechanism, real accountant."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from deal_core.errors import UserError
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.noise import SeededNoise
from server.folder import exclusive_lock
from simulations.audit.command import AuditRequest, run_audit
from simulations.audit.found import Found, Training
from simulations.audit.judged import judged
from simulations.audit.run import FOUND, carry_out, known, share_of
from simulations.audit.tables import Audit, AuditedCell, markdown

AUDITED = (
    'data.tasks=["laboratory"]',
    "federation.participants=[0]",
    "federation.rounds=1",
    "train.precision=float32",
    "data.max_test=8",
    "train.batch_size=64",
    "federation.local_epochs=4",
    "privacy.target_delta=1e-5",
)


def training(make_experiment, folder, *overrides, kind="gradients", canaries=250) -> Training:
    experiment = make_experiment(*AUDITED, f'run.out="{folder}"', *overrides)
    return Training(experiment, kind, client=0, canaries=canaries, seed=5, delta=1e-5)


RECORD = ("privacy.mechanism=record", "privacy.sample_rate=0.5")


def test_noise_switched_off_is_caught(make_experiment, tmp_path, monkeypatch):
    """The accountant still says epsilon = 1; the updates tell otherwise."""
    monkeypatch.setattr(
        SeededNoise, "normal", lambda self, shape: torch.zeros(shape, dtype=torch.float64)
    )
    what = training(make_experiment, tmp_path / "off", *RECORD, "privacy.target_epsilon=1.0")
    found = carry_out(what, lambda event: None)
    assert 0.9 < found.claimed <= 1.0
    verdict = judged([found])
    assert verdict.bound.epsilon > 2 * found.claimed
    assert verdict.refuted


def test_a_training_is_one_processs_at_a_time(make_experiment, tmp_path, monkeypatch):
    what = training(make_experiment, tmp_path / "one", *RECORD)
    kept = what.folder / "ledger.jsonl"
    kept.parent.mkdir()
    kept.write_text("of the other process")
    lock = tmp_path / ".one.lock"
    with exclusive_lock(lock), pytest.raises(UserError, match="another process"):
        carry_out(what, lambda event: None)
    assert kept.read_text() == "of the other process"
    found = object()
    monkeypatch.setattr("simulations.audit.run.known", lambda training: found)
    assert carry_out(what, lambda event: None) is found  # the other has ended with it meanwhile
    assert kept.exists()


@pytest.mark.parametrize("epsilon", [1.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_the_mechanism_as_it_is_stays_below_its_claim(make_experiment, tmp_path, epsilon):
    what = training(make_experiment, tmp_path / "on", *RECORD, f"privacy.target_epsilon={epsilon}")
    found = carry_out(what, lambda event: None)
    assert 0.9 * epsilon < found.claimed <= epsilon
    verdict = judged([found])
    assert verdict.bound.epsilon < found.claimed
    assert not verdict.refuted
    assert known(what) == found


def test_without_a_mechanism_canaries_are_plain_to_see(make_experiment, tmp_path):
    found = carry_out(training(make_experiment, tmp_path / "none"), lambda event: None)
    assert found.claimed is None
    assert found.unit is None
    assert judged([found]).bound.epsilon > 2


def test_texts_are_planted_scored_and_counted(make_experiment, tmp_path):
    what = training(
        make_experiment,
        tmp_path / "texts",
        "federation.clients=1",
        "data.max_train=16",
        "federation.local_epochs=1",
        "train.max_length=16",
        kind="texts",
        canaries=6,
    )
    found = carry_out(what, lambda event: None)
    assert (found.kind, found.outcomes[0].canaries) == ("texts", 6)
    assert (found.membership.members, found.membership.others) == (10, 8)
    assert found.membership.true_positives is None
    assert judged([found]).bound.epsilon == 0  # six coins can refute nothing


@pytest.mark.slow
def test_canaries_change_no_claim(make_experiment, tmp_path):
    """They are charged what the site's records would be: with the rate that it has without them."""
    config = make_experiment(*AUDITED, "privacy.mechanism=record", f'run.out="{tmp_path / "run"}"')
    what = Training(config, "gradients", client=0, canaries=250, seed=5, delta=1e-5, records=8)
    found = carry_out(what, lambda event: None)
    records = len(share_of(config, "laboratory", 0).train)
    [spent] = found.spent
    assert spent.sample_rate == min(1.0, 64 / records)
    assert spent.steps == 4 * -(-1 // spent.sample_rate)
    ledger = Ledger(tmp_path / "run" / "sites" / "0")
    assert composed(ledger.events(), 1e-5) == found.claimed


SUMMED = (
    'data.tasks=["laboratory"]',
    'adapter.kind="pooled"',
    "aggregation.secure=true",
    "federation.clients=3",
    "federation.rounds=2",
    "train.step=server",
    "train.precision=float32",
    "data.max_test=8",
    "privacy.target_delta=1e-5",
    "privacy.target_epsilon=4.0",
)
SUM_NOISE = ("privacy.mechanism=record", "privacy.noise_share=sum")


def summed(make_experiment, folder, *overrides) -> Found:
    experiment = make_experiment(*SUMMED, f'run.out="{folder}"', *overrides)
    what = Training(experiment, "sums", client=1, canaries=500, seed=5, delta=1e-5, records=4)
    return carry_out(what, lambda event: None)


def test_noise_in_the_sum_stays_below_its_claim_and_says_whom_it_trusts(make_experiment, tmp_path):
    found = summed(make_experiment, tmp_path / "on", *SUM_NOISE)
    assert 3.6 < found.claimed <= 4.0
    assert [(s.sample_rate, s.steps) for s in found.spent] == [(1.0, 2)]
    assert found.assumes.startswith("all sites but 1, which may pool what they know")
    verdict = judged([found])
    assert not verdict.refuted
    assert 0.7 < verdict.notices.efficiency < 1.3
    audit = Audit(experiment="it", cells=[AuditedCell(epsilon="4", attacks=[verdict])])
    told = " ".join(markdown(audit).split())
    for part in ("Client 1 among all.", f"if these are honest: {found.assumes}.", "500 sums"):
        assert part in told
    assert "the server included" not in told


def test_shares_that_are_too_small_are_caught(make_experiment, tmp_path, monkeypatch):
    """Each site adds a tenth of the variance that it is counted on for; the ledgers know nothing of
    it."""
    monkeypatch.setattr("deal_core.protection.shares_of", lambda experiment: 20)
    found = summed(make_experiment, tmp_path / "less", *SUM_NOISE)
    assert 3.6 < found.claimed <= 4.0
    assert judged([found]).refuted


def test_a_sum_without_noise_hides_nothing(make_experiment, tmp_path):
    found = summed(make_experiment, tmp_path / "none")
    assert (found.claimed, found.assumes) == (None, "")
    assert judged([found]).bound.epsilon > 3


def test_a_sum_that_a_site_is_missing_from_is_no_audit(make_experiment, tmp_path, monkeypatch):
    """Where the attacked one cannot read its records, noise alone leaves it."""
    total = NoisySum.total

    def failing(self, module, objective):
        if len(self.data) > 500:  # the attacked site's, canaries included
            raise RuntimeError("broken")
        return total(self, module, objective)

    monkeypatch.setattr(NoisySum, "total", failing)
    with pytest.raises(UserError, match="saw no whole sums"):
        summed(make_experiment, tmp_path / "broken", *SUM_NOISE)


@pytest.mark.slow
def test_texts_with_random_labels_show_where_nothing_is_private(make_experiment, tmp_path):
    what = training(
        make_experiment,
        tmp_path / "texts",
        "federation.clients=1",
        "data.max_train=96",
        "data.max_test=100",
        "train.batch_size=8",
        "train.learning_rate=5e-3",
        "federation.local_epochs=6",
        kind="texts",
        canaries=48,
    )
    found = carry_out(what, lambda event: None)
    assert found.claimed is None
    assert found.outcomes[0].canaries == 48
    assert judged([found]).bound.epsilon > 0.3
    assert (found.membership.members, found.membership.others) == (48, 100)
    assert found.membership.auc.value > 0.6
    assert found.membership.true_positives is not None


def test_what_a_folder_holds_of_other_settings_is_refused(make_experiment, tmp_path):
    what = training(make_experiment, tmp_path / "run", canaries=20)
    carry_out(what, lambda event: None)
    for changed, told in (
        (replace(what, canaries=21), "canaries is 21"),
        (replace(what, seed=6), "seed is 6"),
        (replace(what, records=5), "records is 5"),
        (replace(what, repeat=1), "repeat is 1"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            known(changed)
        assert "\n" not in str(caught.value)
    (what.folder / FOUND).write_text('{"of": "another version"}')
    with pytest.raises(UserError, match=r"no audit .*; remove it to train again, or") as caught:
        known(what)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "scale"), [("1", 0.5), ("8", 0.25), ("1", 1.0), ("8", 1.0)])
def test_the_command_refutes_too_little_noise_and_nothing_else(
    tmp_path, monkeypatch, epsilon, scale
):
    """The sizes that ``deal audit`` has by default, on the experiment that is shipped for it."""
    drawn = SeededNoise.normal
    monkeypatch.setattr(SeededNoise, "normal", lambda self, shape: scale * drawn(self, shape))
    out = tmp_path / "audit"
    request = AuditRequest("private-site", epsilon, str(out), text_canaries=0)
    code = run_audit(request, Console(file=io.StringIO()))
    [attack] = Audit.model_validate_json((out / "audit.json").read_text()).cells[0].attacks
    assert attack.claimed <= float(epsilon)
    assert code == (1 if scale < 1 else 0)
    assert (attack.p_value < 0.05) == (scale < 1)
