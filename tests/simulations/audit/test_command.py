"""``deal audit`` around its trainings: what is trained, what is told, how it ends."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deal_core.errors import UserError
from simulations.audit import command
from simulations.audit.command import AuditRequest, planned, run_audit
from simulations.audit.found import Attack, Figure, Found, Outcome, Steps, Training
from simulations.audit.tables import Audit
from simulations.run.preflight import preflight


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


SIGMA = {1.0: 3.73, 8.0: 0.6}
"""Epsilon at delta 1e-5 to the noise of one step on all records."""


def trained(training: Training, share: float) -> Found:
    """As if it had been trained, and so many of all guesses were right."""
    privacy = training.experiment.privacy
    private = privacy.mechanism != "none"
    figure = Figure(value=0.5, low=0.4, high=0.6)
    attack = Attack(auc=figure, true_positives=None, members=5, others=7)
    sigma = SIGMA[privacy.target_epsilon]
    sizes = (20, 80, 400, 40)
    return Found(
        kind=training.kind,
        client=training.client,
        canaries=training.canaries,
        records=training.records,
        seed=training.seed,
        repeat=training.repeat,
        mechanism=privacy.mechanism,
        unit=privacy.mechanism if private else None,
        simulation_only=private,
        claimed=privacy.target_epsilon if private else None,
        delta=training.delta,
        spent=[Steps(sample_rate=1.0, noise_multiplier=sigma, steps=1)] if private else [],
        outcomes=[Outcome(canaries=400, guesses=n, correct=round(share * n)) for n in sizes],
        membership=attack if training.kind == "texts" else None,
    )


def audited(monkeypatch, tmp_path, share: float) -> tuple[int, str, Audit]:
    monkeypatch.setattr(command, "carry_out", lambda training, listener: trained(training, share))
    screen, out = console(), str(tmp_path / "out")
    request = AuditRequest("quickstart", out=out, repetitions=2)
    code = run_audit(request, screen)
    told = (tmp_path / "out" / "audit.json").read_text()
    page = (tmp_path / "out" / "audit.md").read_text()
    assert max(map(len, page.splitlines())) <= 100
    return code, screen.file.getvalue(), Audit.model_validate_json(told)


def test_every_budget_with_either_kind_of_canaries(tmp_path):
    trainings = planned(AuditRequest("quickstart", "8,inf", client=1, repetitions=2), tmp_path)
    assert [(t.kind, t.repeat, t.experiment.privacy.mechanism) for t in trainings] == [
        ("gradients", 0, "record"),
        ("gradients", 1, "record"),
        ("texts", 0, "record"),
        ("gradients", 0, "none"),
        ("gradients", 1, "none"),
        ("texts", 0, "none"),
    ]
    for training in trainings:
        config = training.experiment
        assert config.federation.participants == (1,)
        assert config.privacy.target_delta == 1e-5
        assert (config.wire.dtype, config.run.workers) == ("float32", 1)
        assert config.run.seed == training.repeat  # noise of its own
        assert training.records == (32 if training.kind == "gradients" else 0)
    assert len({training.folder for training in trainings}) == 6
    alone = planned(AuditRequest("quickstart", "8", text_canaries=0), tmp_path)
    assert [t.kind for t in alone] == ["gradients"] * 8


def test_noise_in_a_sum_is_attacked_through_the_sum_with_all_sites(tmp_path):
    trainings = planned(AuditRequest("private", "8,inf", client=3, repetitions=2), tmp_path)
    assert [(t.kind, t.experiment.privacy.mechanism, t.records) for t in trainings] == [
        ("sums", "record", 32),
        ("sums", "record", 32),
        ("sums", "none", 32),
        ("sums", "none", 32),
    ]
    # Two rows learn where a task has three labels; two of their 384 entries each are a canary's.
    assert {t.canaries for t in trainings} == {2 * 384 // 2}
    less = AuditRequest("private", "8", client=3, canaries=100, repetitions=1)
    assert [t.canaries for t in planned(less, tmp_path)] == [100]
    for training in trainings:
        config = training.experiment
        assert config.federation.participants == ()
        assert config.aggregation.secure
        preflight(config)


def test_sums_that_canaries_do_not_fit_into_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="'prototype' adds up embeddings") as caught:
        planned(AuditRequest("private-sums"), tmp_path)
    assert "\n" not in str(caught.value)


def test_guesses_as_the_claims_allow_refute_nothing(monkeypatch, tmp_path):
    code, screen, audit = audited(monkeypatch, tmp_path, 0.53)
    assert code == 0
    assert [cell.epsilon for cell in audit.cells] == ["1", "8", "inf"]
    told = " ".join(screen.split())
    for part in ("delta = 1e-05 per record", "all rounds and tasks", "the server included"):
        assert part in told
    rows = [" ".join(line.split()) for line in screen.splitlines()]
    (row,) = [row for row in rows if row.startswith("record 1 2 × 400 gradients")]
    assert row.endswith(" not refuted")
    table = screen.partition("mechanism  claim")[2].partition("figures in")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 100
    assert "REFUTED" not in screen
    assert "Simulation only" in screen
    assert "fewer than 100 others" in screen
    for cell in audit.cells[:2]:
        assert cell.strongest.bound.epsilon < cell.strongest.claimed
        gradients, texts = cell.attacks
        assert gradients.notices.scale < 1
        assert texts.notices is None
    assert audit.cells[0].attacks[0].notices.scale > 0


def test_guesses_that_a_claim_does_not_allow_fail_the_command(monkeypatch, tmp_path):
    code, screen, audit = audited(monkeypatch, tmp_path, 0.75)
    assert code == 1
    assert screen.count("REFUTED") == 2  # both attacks at epsilon 1; 8 and no claim stand
    assert audit.cells[0].attacks[0].p_value < 0.05


def test_bad_input_is_refused_before_anything_starts(tmp_path):
    for wrong, told in (
        ({"client": 9}, "clients 0 to"),
        ({"epsilon": "0"}, "--epsilon"),
        ({"overrides": ("stream.schedule=per-client",)}, "synchronous"),
        ({"overrides": ("privacy.disjoint_tasks=true",)}, "canaries are in every task"),
    ):
        request = AuditRequest("quickstart", out=str(tmp_path / "out"), **wrong)
        with pytest.raises(UserError, match=told) as caught:
            run_audit(request, console())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
