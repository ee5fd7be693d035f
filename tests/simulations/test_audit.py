"""``deal audit`` around its trainings: what is trained, what is told, how it ends."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deal_core.errors import UserError
from simulations import audit as command
from simulations.audit import AuditRequest, planned, run_audit
from simulations.audit_found import Attack, Bound, Figure, Found, Training
from simulations.audit_tables import Audit

WHOLE = ("privacy.mechanism=client",)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def judged(training: Training, epsilon: float) -> Found:
    """As if it had been trained."""
    private = training.experiment.privacy.mechanism != "none"
    figure = Figure(value=0.5, low=0.4, high=0.6)
    attack = Attack(auc=figure, true_positives=None, members=5, others=7)
    return Found(
        kind=training.kind,
        client=training.client,
        canaries=training.canaries,
        seed=training.seed,
        mechanism=training.experiment.privacy.mechanism,
        unit=training.experiment.privacy.mechanism if private else None,
        simulation_only=private,
        claimed=training.experiment.privacy.target_epsilon if private else None,
        delta=training.delta,
        bound=Bound(
            epsilon=epsilon,
            delta=training.delta,
            confidence=0.95,
            canaries=training.canaries,
            guesses=10,
            correct=9,
        ),
        membership=attack if training.kind == "texts" else None,
    )


def audited(monkeypatch, tmp_path, epsilon: float, overrides=()) -> tuple[int, str, Audit]:
    monkeypatch.setattr(command, "carry_out", lambda training, listener: judged(training, epsilon))
    screen, out = console(), str(tmp_path / "out")
    code = run_audit(AuditRequest("quickstart", out=out, overrides=overrides), screen)
    told = (tmp_path / "out" / "audit.json").read_text()
    return code, screen.file.getvalue(), Audit.model_validate_json(told)


def test_every_budget_with_either_kind_of_canaries(tmp_path):
    trainings = planned(AuditRequest("quickstart", "8,inf", client=1), tmp_path)
    assert [(t.kind, t.experiment.privacy.mechanism) for t in trainings] == [
        ("gradients", "record"),
        ("texts", "record"),
        ("gradients", "none"),
        ("texts", "none"),
    ]
    for training in trainings:
        config = training.experiment
        assert config.federation.participants == (1,)
        assert config.privacy.target_delta == 1e-5
        assert (config.wire.dtype, config.run.workers) == ("float32", 1)
    assert len({training.folder for training in trainings}) == 4


def test_whole_clients_are_attacked_by_canary_clients_alone(monkeypatch, tmp_path):
    """The page has no column of another kind, and the claim is one of whole clients."""
    trainings = planned(AuditRequest("quickstart", "8,inf", overrides=WHOLE), tmp_path)
    assert [(t.kind, t.experiment.privacy.mechanism, t.canaries) for t in trainings] == [
        ("clients", "client", 1000),
        ("clients", "none", 1000),
    ]
    code, screen, audit = audited(monkeypatch, tmp_path, 0.7, WHOLE)
    assert code == 0
    assert [(cell.epsilon, len(cell.trainings)) for cell in audit.cells] == [
        ("1", 1),
        ("8", 1),
        ("inf", 1),
    ]
    head = next(line for line in screen.splitlines() if line.startswith("| mechanism"))
    assert "canary clients" in head
    for other in ("gradient", "text", "AUC", "TPR"):
        assert other not in head
    row = next(line for line in screen.splitlines() if line.startswith("| client | 1 at"))
    assert row.count("|") == head.count("|")
    for part in ("delta = 1e-05", "per client", "over all rounds and tasks", "≥ 0.70"):
        assert part in row


def test_a_bound_below_every_claim_refutes_nothing(monkeypatch, tmp_path):
    code, screen, audit = audited(monkeypatch, tmp_path, 0.7)
    assert code == 0
    assert [cell.epsilon for cell in audit.cells] == ["1", "8", "inf"]
    assert [cell.strongest.bound.epsilon for cell in audit.cells] == [0.7, 0.7, 0.7]
    row = next(line for line in screen.splitlines() if "1 at delta" in line)
    for part in ("delta = 1e-05", "per record", "over all rounds and tasks", "≥ 0.70"):
        assert part in row
    assert "not refuted" in row
    assert "REFUTED" not in screen
    assert "Simulation only" in screen
    assert "fewer than 100 non-members" in screen


def test_a_bound_above_a_claim_fails_the_command(monkeypatch, tmp_path):
    code, screen, _ = audited(monkeypatch, tmp_path, 1.5)
    assert code == 1
    assert screen.count("REFUTED") == 1  # epsilon = 8 and no claim stand


def test_bad_input_is_refused_before_anything_starts(tmp_path):
    for wrong, told in (
        ({"client": 9}, "clients 0 to"),
        ({"epsilon": "0"}, "--epsilon"),
        ({"overrides": ("stream.schedule=per-client",)}, "synchronous"),
        ({"overrides": ("privacy.disjoint_tasks=true",)}, "canaries are in every task"),
        (
            {"overrides": ("privacy.mechanism=client", "privacy.trusted_server=false")},
            "the server's noise",
        ),
    ):
        request = AuditRequest("quickstart", out=str(tmp_path / "out"), **wrong)
        with pytest.raises(UserError, match=told) as caught:
            run_audit(request, console())
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
