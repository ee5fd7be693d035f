"""``deal budgets``: one small grid by the real command, its tables, and what they say."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from deal_core.errors import UserError
from deal_core.ledger import Ledger, composed
from server.results import read_results
from simulations.audit_found import Bound, Found
from simulations.audit_tables import Audit, Cell
from simulations.budgets import BudgetsRequest, run_budgets
from simulations.budgets_results import Budgets
from simulations.epsilons import epsilons, named

SMALL = (
    'data.tasks=["laboratory", "surgery"]',
    "data.max_train=16",
    "data.max_test=16",
    "federation.clients=2",
    "federation.rounds=1",
    "train.max_length=16",
)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def audit_in(folder) -> str:
    bound = {"delta": 1e-5, "confidence": 0.95, "canaries": 9, "guesses": 9, "correct": 9}
    found = Found(
        kind="gradients",
        client=0,
        canaries=9,
        seed=0,
        mechanism="record",
        unit="record",
        simulation_only=True,
        claimed=8.0,
        delta=1e-5,
        bound=Bound(epsilon=1.25, **bound),
    )
    folder.mkdir()
    audit = Audit(experiment="quickstart", cells=[Cell(epsilon="8", trainings=[found])])
    (folder / "audit.json").write_text(audit.model_dump_json())
    return str(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    audit = audit_in(folder / "audit")
    out = str(folder / "out")
    request = BudgetsRequest("quickstart", "8,inf", "sequential", 1, out, SMALL, audit, 2)
    code = run_budgets(request, console())
    budgets = Budgets.model_validate_json((folder / "out" / "budgets.json").read_text())
    return folder / "out", request, code, budgets


def test_a_point_for_every_budget(done):
    _, _, code, budgets = done
    assert code == 0
    assert [(p.method, p.epsilon) for p in budgets.points] == [
        ("sequential", "8"),
        ("sequential", "inf"),
    ]
    private, free = budgets.points
    assert 7.5 < private.spent <= 8.0
    assert private.delta > 0
    assert (private.unit, private.simulation_only) == ("record", True)
    assert private.lower_bound == 1.25
    assert (free.spent, free.delta, free.unit, free.lower_bound) == (None, None, None, None)


def test_the_sweep_composes_the_ledgers_of_its_private_runs(done):
    out, _, _, budgets = done
    run = out / "cells" / "eps-8.sequential.seed0"
    privacy = read_results(run).privacy
    most = max(privacy.epsilon, key=lambda client: privacy.epsilon[client])
    events = Ledger(run / "sites" / most).events()
    assert budgets.sweep.epsilon == pytest.approx(composed(events, budgets.sweep.delta))
    assert (budgets.sweep.runs, budgets.sweep.without_privacy) == (1, 1)


def test_no_epsilon_without_what_it_means(done):
    text = (done[0] / "budgets.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 8 "))
    for part in ("at delta", "per record", "simulation only", "≥ 1.25"):
        assert part in line
    sweep = text.split("## The sweep itself")[1]
    for part in ("epsilon = ", "at delta", "per record", "composed over", "no epsilon holds"):
        assert part in sweep


def test_there_is_a_plot(done):
    assert (done[0] / "budgets.png").read_bytes().startswith(b"\x89PNG")


def test_again_nothing_is_left_and_a_further_budget_starts_alone(done):
    out, request, _, _ = done
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/results.json")}
    assert len(stamps) == 2
    screen = console()
    assert run_budgets(request, screen) == 0
    assert "runs left" not in screen.file.getvalue()
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/results.json")} == stamps
    more = BudgetsRequest(**{**vars(request), "epsilon": "2,8,inf", "report": True})
    assert run_budgets(more, screen) == 0
    told = json.loads((out / "budgets.json").read_text())
    assert (told["wanted"], told["finished"]) == (3, 2)


def test_budgets_are_read_or_refused_in_one_line():
    assert epsilons("8,inf, 0.5") == [0.5, 8.0, float("inf")]
    assert [named(e) for e in epsilons("8,inf,0.5")] == ["0.5", "8", "inf"]
    for bad in ("", "0,1", "-1", "nan", "a", "1,1"):
        with pytest.raises(UserError, match="--epsilon") as caught:
            epsilons(bad)
        assert "\n" not in str(caught.value)


def test_bad_input_is_refused_before_anything_starts(tmp_path):
    out = str(tmp_path / "out")
    for wrong, told in (
        ({"method": "dael"}, "unknown method 'dael'"),
        ({"method": "deal,deal"}, "twice"),
        ({"audit": str(tmp_path)}, "no audit in it"),
    ):
        with pytest.raises(UserError, match=told):
            run_budgets(BudgetsRequest("quickstart", out=out, **wrong), console())
    assert not (tmp_path / "out").exists()
