"""``deal audit`` around its trainings: what is trained, what is told, how it ends."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent
from simulations.audit import command
from simulations.audit.claim import Guesses
from simulations.audit.command import Audit, AuditRequest, planned, run_audit
from simulations.audit.run import Found, Training, alone
from simulations.run.check import preflight

SIGMA = {1.0: 3.73, 8.0: 0.6}
"""Epsilon at delta 1e-5 to the noise of one step on all records."""


def trained(training: Training, share: float) -> Found:
    """As if it had been trained, and so many of all guesses were right."""
    epsilon = training.experiment.privacy.target_epsilon
    return Found(
        client=training.client,
        in_sum=False,
        unit="record",
        simulation_only=True,
        claimed=epsilon,
        delta=1e-5,
        spent=(DpEvent(1.0, SIGMA[epsilon], 1),),
        outcomes=tuple(Guesses(400, n, round(share * n)) for n in (20, 80, 400, 40)),
    )


def audited(monkeypatch, tmp_path, share: float, epsilon: str) -> tuple[int, str, Audit]:
    monkeypatch.setattr(command, "carry_out", lambda training, listener: trained(training, share))
    screen = Console(file=io.StringIO(), width=200)
    code = run_audit(AuditRequest("quickstart", epsilon, str(tmp_path), repetitions=2), screen)
    page = (tmp_path / "audit.md").read_text()
    assert max(map(len, page.splitlines())) <= 100
    audit = Audit.model_validate_json((tmp_path / "audit.json").read_text())
    return code, screen.file.getvalue(), audit


def test_every_budget_with_repetitions_of_one_site():
    trainings = planned(AuditRequest("quickstart", "2,8", client=1, repetitions=2))
    assert [(t.experiment.privacy.target_epsilon, t.repeat) for t in trainings] == [
        (2.0, 0),
        (2.0, 1),
        (8.0, 0),
        (8.0, 1),
    ]
    assert {(t.client, t.canaries, t.records) for t in trainings} == {(1, 2000, 32)}
    with alone(trainings[1].experiment, 1, 1) as config:
        assert config.federation.participants == (1,)
        assert config.privacy.target_delta == 1e-5
        assert (config.wire.dtype, config.run.workers) == ("float32", 1)
        assert config.run.seed == 1  # noise of its own


def test_noise_in_a_sum_is_attacked_through_the_sum_with_all_sites():
    [training] = planned(AuditRequest("private", "8", client=3, repetitions=1))
    # Two rows learn where a task has three labels; two of their 384 entries each are a canary's.
    assert training.canaries == 2 * 384 // 2
    less = AuditRequest("private", "8", client=3, canaries=100, repetitions=1)
    assert [t.canaries for t in planned(less)] == [100]
    with alone(training.experiment, 3) as config:
        assert config.federation.participants == ()
        assert config.aggregation.secure
        preflight(config)


def test_guesses_as_the_claims_allow_refute_nothing(monkeypatch, tmp_path):
    code, screen, audit = audited(monkeypatch, tmp_path, 0.53, "1,8")
    assert code == 0
    assert [cell.epsilon for cell in audit.cells] == ["1", "8"]
    told = " ".join(screen.split())
    for part in ("delta = 1e-05 per record", "all rounds and tasks", "the server included"):
        assert part in told
    rows = [" ".join(line.split()) for line in screen.splitlines()]
    (row,) = [row for row in rows if row.startswith("1 2 × 400")]
    assert row.endswith(" not refuted")
    assert "REFUTED" not in screen
    assert "Simulation only" in screen
    assert all(cell.bound.epsilon < cell.claimed for cell in audit.cells)


def test_guesses_that_a_claim_does_not_allow_fail_the_command(monkeypatch, tmp_path):
    code, screen, audit = audited(monkeypatch, tmp_path, 0.75, "1")
    assert code == 1
    assert screen.count("REFUTED") == 1
    assert audit.cells[0].p_value < 0.05
    assert audit.cells[0].bound.epsilon > audit.cells[0].claimed


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"client": 9}, "clients 0 to"),
        ({"epsilon": "0"}, "--epsilon"),
        ({"epsilon": "8,inf"}, "no claim to test"),
        ({"overrides": ("stream.schedule=per-client",)}, "synchronous"),
        ({"overrides": ("privacy.disjoint_tasks=true",)}, "canaries are in every task"),
        ({"experiment": "private-sums"}, "'prototype' adds up embeddings"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path, wrong, told):
    request = AuditRequest(**{"experiment": "quickstart", "out": str(tmp_path / "out"), **wrong})
    with pytest.raises(UserError, match=told):
        run_audit(request, Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
