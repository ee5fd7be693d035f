"""``deal budgets``: one small grid by the real command, its tables, and what they say."""

from __future__ import annotations

import io
import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deal_core.config.experiment import RunConfig
from deal_core.errors import UserError
from deal_core.privacy.audit.guesses import CHOICES, Guesses
from deal_core.privacy.audit.one_run_audit import lower_bound
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from server.results import read_results, rounded_up
from simulations.audit.command import AuditRequest, run_audit
from simulations.audit.found import Found, Outcome, Steps, Training
from simulations.budgets.budget_study import budgets_study
from simulations.budgets.command import BudgetsRequest, run_budgets, write
from simulations.budgets.plot import figure_of
from simulations.budgets.results import Budgets, Sweep, has_class_means
from simulations.budgets.tables import MEANS_APART, budget_table, markdown, sweep_text
from simulations.run.epsilons import epsilons, named, with_budget
from simulations.run.experiment import Request, load_experiment
from simulations.run.shipped import shipped_experiments
from simulations.study.grid import grid
from tests.forked import Forker
from tests.stored_results import RESULTS

SMALL = (
    'data.tasks=["laboratory", "surgery"]',
    "data.max_train=16",
    "data.max_test=16",
    "data.partition.kind=pathological",
    "federation.clients=2",
    "federation.rounds=1",
    "train.max_length=16",
    "run.threads=1",
    "run.workers=1",
)


STORED = RESULTS / "budgets/budgets.json"
SHOWN = lower_bound([[Guesses(400, 400, 256)] * len(CHOICES)] * 2, 1e-5).epsilon
"""What the audit below shows."""


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def trained(training: Training, listener) -> Found:
    """As if it had been trained."""
    private = training.experiment.privacy.mechanism != "none"
    right = 200 if training.kind == "texts" else 256
    outcome = Outcome(canaries=400, guesses=400, correct=right)
    return Found(
        kind=training.kind,
        client=0,
        canaries=400,
        records=0,
        seed=0,
        repeat=training.repeat,
        mechanism=training.experiment.privacy.mechanism,
        unit=training.experiment.privacy.mechanism if private else None,
        simulation_only=private,
        claimed=training.experiment.privacy.target_epsilon if private else None,
        delta=1e-5,
        spent=[Steps(sample_rate=1.0, noise_multiplier=0.6, steps=1)] if private else [],
        outcomes=[outcome] * len(CHOICES),
    )


def audit_in(folder) -> str:
    """What ``deal audit`` leaves, but for the trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulations.audit.command.carry_out", trained)
        request = AuditRequest("quickstart", "8", str(folder), SMALL, repetitions=2)
        assert run_audit(request, console()) == 0
    return str(folder)


@pytest.fixture(scope="module")
def forked(fork: Forker) -> Iterator[None]:
    """Runs are forked; that they are started rightly is seen in the tests of ``deal study``."""
    names = {**vars(subprocess), "Popen": fork.popen}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simulations.study.runs.subprocess", SimpleNamespace(**names))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory, forked):
    folder = tmp_path_factory.mktemp("budgets")
    audit = audit_in(folder / "audit")
    out = str(folder / "out")
    request = BudgetsRequest("quickstart", "8,inf", "sequential", "0", out, SMALL, audit, 2)
    code = run_budgets(request, console())
    budgets = Budgets.model_validate_json((folder / "out" / "budgets.json").read_text())
    return folder / "out", request, code, budgets


def test_what_is_set_for_all_runs_overrules_neither_budget_nor_its_absence(tmp_path):
    sets = (*SMALL, "privacy.mechanism=record", "privacy.target_delta=1e-3", "adapter.rank=2")
    base = load_experiment(Request("quickstart", "", sets))
    study = budgets_study("quickstart", base, [2.0, math.inf], ["deal", "lwf"], [0], overrides=sets)
    cells = grid(study, tmp_path)
    assert len(cells) == 4
    for cell in cells:
        (run,) = cell.runs.values()
        privacy = run.privacy
        if cell.arm == "eps-inf":
            assert privacy.mechanism == "none"
        else:
            assert (privacy.mechanism, privacy.target_epsilon) == ("record", 2.0)
        assert run.method.name == cell.setting
        assert (run.adapter.rank, run.privacy.target_delta) == (2, 1e-3)


def test_a_budget_has_one_place_and_a_name_one_meaning(tmp_path):
    def refused(**changes) -> str:
        request = BudgetsRequest("quickstart", out=str(tmp_path), **changes)
        with pytest.raises(UserError) as caught:
            run_budgets(request, console())
        return str(caught.value)

    assert "--epsilon" in refused(overrides=("privacy.target_epsilon=4",))
    lwf = tmp_path / "lwf.toml"
    lwf.write_text(shipped_experiments()["quickstart"].read_text())
    same = tmp_path / "other"
    same.mkdir()
    (same / "lwf.toml").write_text(lwf.read_text())
    assert "names 'lwf' twice" in refused(beside=f"{lwf},{same / 'lwf.toml'}")
    assert "is the name of a method" in refused(method="deal,lwf", beside=str(lwf))


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
    assert (private.lower_bound, private.lower_bound_delta) == (SHOWN, 1e-5)
    assert (free.spent, free.delta, free.unit, free.lower_bound) == (None, None, None, None)


def test_accuracy_among_all_labels_is_that_of_the_runs(done):
    out, _, _, budgets = done
    for point in budgets.points:
        found = read_results(out / "cells" / f"eps-{point.epsilon}.sequential.seed0")
        assert found.class_incremental is not None
        assert point.class_incremental.mean == found.class_incremental.average_accuracy
        shown = f"{100 * point.class_incremental.mean:.1f}"
        assert f"| {shown} |" in (out / "budgets.md").read_text()


def test_it_is_said_where_class_means_answer_without_privacy_alone(make_experiment):
    auto = ("method.name=deal", "method.prototype.enabled=auto", "federation.clients=3")
    for each in ("none", "record"):
        assert has_class_means(make_experiment(*auto, f"privacy.mechanism={each}"))
    assert not has_class_means(make_experiment("method.name=lwf"))
    assert not has_class_means(make_experiment("method.name=deal", "method.prototype.enabled=off"))
    point = Budgets.model_validate_json(STORED.read_text()).points[0]
    apart = [point, point.model_copy(update={"epsilon": "inf", "class_means": True})]
    assert MEANS_APART in list(budget_table(apart, False))
    assert MEANS_APART not in list(budget_table([point], False))


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
    (point, _) = done[3].points
    line = next(line for line in text.splitlines() if line.startswith("| 8 "))
    assert line.endswith(f" {rounded_up(point.spent, 3)} | ≥ {SHOWN:.2f} |")
    (spent,) = [line for line in text.splitlines() if line.startswith("Spent: ")]
    meaning = (
        f"at delta = {rounded_up(point.delta, 2)}",
        "per record",
        "over all rounds",
        point.assumes,
    )
    for part in (*meaning, "simulation only"):
        assert part
        assert part in spent
    bound = "Lower bound: on epsilon at delta = 1e-05 per record, of the audit's own experiment."
    assert bound in text.splitlines()
    sweep = text.split("## The sweep itself")[1]
    for part in ("epsilon = ", "at delta", "per record", "composed over", "no epsilon holds"):
        assert part in sweep


def test_the_sweep_says_whom_its_epsilon_protects():
    text = sweep_text(Sweep(runs=3, epsilon=9.5, delta=1e-5, unit="record", without_privacy=0))
    whom = "a record that lies in every run"
    for part in ("epsilon = 9.5", "delta = 1e-05", "per record", "composed over", whom):
        assert part in text


def test_the_plot_shows_the_bound_beside_the_claim(done):
    assert (done[0] / "budgets.png").read_bytes().startswith(b"\x89PNG")
    figure = figure_of(done[3])
    assert len(figure.axes) == 4
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[-1].lines}
    assert lines == {
        "claimed": [[8.0, 8.0]],
        "lower bound (95 %), delta = 1e-05": [[8.0, SHOWN]],
    }
    for part in ("delta", "per record", "over all rounds and tasks", "simulation only"):
        assert part in figure.get_suptitle()
    points = [p.model_copy(update={"disjoint_tasks": True}) for p in done[3].points]
    parallel = done[3].model_copy(update={"points": points})
    for said in (figure_of(parallel).get_suptitle(), markdown(parallel)):
        assert "all rounds, a record being in one task" in said
        assert "simulation only" in said


def test_a_plot_that_cannot_be_written_is_one_line(done, tmp_path, monkeypatch):
    def full(path, budgets):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simulations.budgets.command.draw", full)
    found = Budgets.model_validate_json((done[0] / "budgets.json").read_text())
    with pytest.raises(UserError, match=r"cannot be written .No space left"):
        write(tmp_path, found)


def test_an_audit_of_another_unit_is_refused(tmp_path):
    """Bounds on groups say nothing of records."""
    audit = audit_in(tmp_path / "audit")
    path = tmp_path / "audit" / "audit.json"
    told = path.read_text().replace('"unit": "record"', '"unit": "group"')
    path.write_text(told)
    request = BudgetsRequest("quickstart", out=str(tmp_path / "out"), audit=audit)
    with pytest.raises(UserError, match="each a group, but the budgets are of a record"):
        run_budgets(request, console())
    assert not (tmp_path / "out").exists()


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
    other = replace(request, overrides=(*SMALL, "train.learning_rate=0.5"), report=True)
    with pytest.raises(UserError, match=r"'train\.learning_rate' is 0\.5, but the run in"):
        run_budgets(other, screen)


def test_budgets_are_read_or_refused_in_one_line():
    assert epsilons("8,inf, 0.5") == [0.5, 8.0, float("inf")]
    assert [named(e) for e in epsilons("8,inf,0.5")] == ["0.5", "8", "inf"]
    for bad in ("", "0,1", "-1", "nan", "a", "1,1", "1e400"):
        with pytest.raises(UserError, match="--epsilon") as caught:
            epsilons(bad)
        assert "\n" not in str(caught.value)


def test_runs_without_privacy_may_have_settings_of_their_own(tmp_path):
    base, free = load_experiment(Request("private")), load_experiment(Request("quickstart"))
    study = budgets_study("private", base, [1.0, 8.0, math.inf], ["deal", "lwf"], [0], free)
    alone = RunConfig()
    for cell in grid(study, tmp_path, ("train.max_length=16",)):
        like = {
            "eps-1": with_budget(base, 1.0),
            "eps-8": with_budget(base, 8.0),
            "eps-inf": free.model_copy(update={"description": base.description}),
        }[cell.arm]
        assert cell.runs[""].model_copy(update={"run": alone}) == like.model_copy(
            update={
                "run": alone,
                "method": like.method.model_copy(update={"name": cell.setting}),
                "train": like.train.model_copy(update={"max_length": 16}),
            }
        )


def test_bad_input_is_refused_before_anything_starts(tmp_path):
    out = str(tmp_path / "out")
    other = tmp_path / "other.toml"
    other.write_text('[federation]\nclients = 4\n[method]\nname = "lwf"\n')
    elsewhere = tmp_path / "elsewhere.toml"
    elsewhere.write_text("[federation]\nparticipants = [1]\n")
    for wrong, told in (
        ({"method": "dael"}, "unknown method 'dael'"),
        ({"method": "deal,deal"}, "twice"),
        ({"seeds": "three"}, "--seeds three: write whole numbers"),
        ({"seeds": "0,0"}, "--seeds: write different whole numbers"),
        ({"seeds": ""}, "--seeds: write different whole numbers"),
        ({"seeds": "-1"}, "--seeds: write different whole numbers"),
        ({"audit": str(tmp_path)}, "no audit .*; see `deal audit`"),
        ({"free": "quikstart"}, "did you mean 'quickstart'"),
        (
            {"overrides": ("federation.clients=3",), "free": str(elsewhere)},
            r"--without-privacy: federation.participants differs",
        ),
        ({"free": str(other)}, "its method is lwf, the experiment's is deal"),
        ({"free": "per-client"}, r"--without-privacy: \[stream\] is another one"),
    ):
        with pytest.raises(UserError, match=told):
            run_budgets(BudgetsRequest("quickstart", out=out, **wrong), console())
    assert not (tmp_path / "out").exists()


def test_noise_at_the_site_stands_beside_noise_in_the_sum():
    base = load_experiment(Request("private"))
    study = budgets_study("private", base, [2.0, math.inf], [], [0], shares=["sum", "site"])
    cells = {cell.name: cell.runs[""].privacy for cell in grid(study, Path("out"), ())}
    assert {
        name: (own.mechanism, own.noise_share, own.target_epsilon) for name, own in cells.items()
    } == {
        "eps-2.deal.seed0": ("record", "sum", 2.0),
        "eps-inf.deal.seed0": ("none", "sum", 8.0),
        "eps-2.deal-noise-site.seed0": ("record", "site", 2.0),
        "eps-inf.deal-noise-site.seed0": ("none", "site", 8.0),
    }
    for bad in (["sum", "sum"], ["server"]):
        with pytest.raises(UserError, match=f"--noise {','.join(bad)}: write site, sum or both"):
            budgets_study("private", base, [2.0], [], [0], shares=bad)


def test_another_experiment_stands_beside_with_the_same_budgets():
    base, other = (load_experiment(Request(name)) for name in ("private", "private-sums"))
    beside = {"private-sums": other}
    study = budgets_study("private", base, [2.0, math.inf], [], [0], beside=beside)
    cells = {cell.name: cell.runs[""] for cell in grid(study, Path("out"), ())}
    assert list(cells) == [
        "eps-2.deal.seed0",
        "eps-inf.deal.seed0",
        "eps-2.private-sums.seed0",
        "eps-inf.private-sums.seed0",
    ]
    own, sums = cells["eps-2.deal.seed0"], cells["eps-2.private-sums.seed0"]
    expected = with_budget(other, 2.0)
    for table in ("method", "federation", "adapter", "train", "privacy", "aggregation"):
        assert getattr(sums, table) == getattr(expected, table)
    assert own.method.name == "deal"
    assert cells["eps-inf.private-sums.seed0"].privacy.mechanism == "none"


def test_what_cannot_be_compared_does_not_stand_beside():
    base, other = (load_experiment(Request(name)) for name in ("private", "private-sums"))
    strict = other.privacy.model_copy(update={"target_delta": 1e-6})
    few = other.federation.model_copy(update={"clients": 3})
    for changed, line in (
        ({"privacy": strict}, "--beside x: privacy.target_delta differs"),
        ({"federation": few}, "--beside x: federation.clients differs"),
    ):
        with pytest.raises(UserError, match=line):
            budgets_study(
                "private", base, [2.0], [], [0], beside={"x": other.model_copy(update=changed)}
            )


@pytest.mark.parametrize("report", [True, False])
def test_stored_figures_whose_runs_are_gone_are_not_overwritten(tmp_path, report):
    (tmp_path / "budgets.json").write_bytes(STORED.read_bytes())
    request = BudgetsRequest("private-site", "8", out=str(tmp_path), report=report)
    with pytest.raises(UserError, match="their runs are not there; name another --out"):
        run_budgets(request, console())
    assert (tmp_path / "budgets.json").read_bytes() == STORED.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budgets.json"]
    (tmp_path / "budgets.json").write_text("")
    with pytest.raises(UserError, match=r"no budget study .*; remove it, or name another --out"):
        run_budgets(request, console())
