"""Membership inference: in class sums it finds members as well as the closed form expects, and in
adapters it finds those that a site has learnt by heart."""

from __future__ import annotations

import io
import json
from functools import cache

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from deal_core.data import open_source
from deal_core.training.evaluation import base_embeddings
from deal_core.training.public_subspace import principal
from simulations.audit import membership
from simulations.audit.membership import (
    MembershipAudit,
    MembershipRequest,
    Rows,
    Told,
    as_added,
    noises,
    run_membership,
    told_of_adapters,
    told_of_sums,
)
from simulations.cli import app
from simulations.report.commands import write_report
from simulations.run.experiment import Request, load_experiment
from tests.conftest import load_once

ADAPTER = Told(
    seen="adapter of round 1",
    noise="none",
    records=9,
    auc=0.655,
    found=None,
    members=9,
    others=9,
    interval=(0.5, 0.8),
)
SHORT = 24
"""Tokens of a text: few, since the test is of sums."""
EACH, DIRECTIONS = 120, 64


@cache
def texts() -> list[Rows]:
    """Records of three labels, added up in directions of their own."""
    config = load_experiment(Request("quickstart"))
    task = open_source(config.data).load("basic-science")
    model = load_once()(config.model, config.adapter, SHORT)
    chosen = [e for name in task.labels for e in [x for x in task.train if x.label == name][:EACH]]
    vectors = base_embeddings(model, model.encode(chosen, task.labels), 4)
    subspace = principal(vectors, DIRECTIONS)
    rows = as_added(subspace.project(vectors).double().numpy(), 1.0, 0.25)
    return np.split(rows, len(task.labels))


@cache
def told() -> tuple[Told, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "SIZES", (20, 40))
        patch.setattr(membership, "DRAWS", 17)
        found = told_of_sums(load_experiment(Request("quickstart")), texts(), 0, lambda line: None)
    return tuple(found)


def of(seen: str, noise: str) -> list[Told]:
    return [each for each in told() if each.seen.startswith(seen) and each.noise == noise]


def test_the_closed_form_expects_what_is_measured() -> None:
    for noise in ("none", "default", "ε = 8", "ε = 2"):
        for each in [each for each in told() if each.noise == noise]:
            assert each.auc == pytest.approx(each.expected, abs=0.04), each
    assert {each.records for each in of("sum over sites (server)", "default")} == {20, 40}


def test_small_sums_without_noise_tell_and_noise_hides() -> None:
    bare, noised = of("a sum", "none"), of("sum over sites (server)", "default")
    assert bare[0].auc > 0.8
    assert bare[0].auc > noised[0].auc + 0.05
    assert of("sum over sites (server)", "ε = 2")[0].auc < 0.57


def test_true_positives_need_a_thousand_others(monkeypatch) -> None:
    assert all(each.others >= 1000 and each.found is not None for each in told())
    monkeypatch.setattr(membership, "DRAWS", 1)
    few = told_of_sums(load_experiment(Request("quickstart")), texts(), 0, lambda line: None)
    assert few
    assert all(each.others < 1000 and each.found is None for each in few)
    assert "n too small" in "\n".join(membership.told_table(few))


def test_noise_is_that_of_a_run() -> None:
    """Four sites, of which a sum needs three and one may collude: 0.61 is the noise of two."""
    config = load_experiment(Request("quickstart"))
    statistics = membership.class_sums_of(config)
    assert statistics is not None
    default = {seen: deviation for seen, name, deviation in noises(config) if name == "default"}
    multiplier = statistics.noise_multiplier
    assert default == pytest.approx(
        {
            "sum over sites (server and 1 colluding)": multiplier * (3 / 2) ** 0.5,
            "sum over sites (server)": multiplier * (4 / 2) ** 0.5,
        }
    )


def test_the_command_writes_figures_and_a_report(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(membership, "embedded", lambda experiment, seed: texts())
    monkeypatch.setattr(membership, "told_of_sums", lambda *given: list(told()))
    monkeypatch.setattr(membership, "told_of_adapters", lambda *given: [ADAPTER])
    screen = Console(file=io.StringIO(), width=120)
    assert run_membership(MembershipRequest(out=str(tmp_path)), screen) == 0
    audit = MembershipAudit.model_validate_json((tmp_path / membership.FILE).read_text())
    assert audit.told == [*told(), ADAPTER]
    assert audit.directions == DIRECTIONS
    page = write_report(tmp_path).read_text()
    assert "sum over sites (server)" in page
    assert "0.66 [0.50, 0.80]" in page
    assert json.loads((tmp_path / membership.FILE).read_text())["experiment"] == "quickstart"


@pytest.mark.parametrize("words", [["membership", "a", "b"], ["budgets", "quickstart"]])
def test_the_command_names_one_experiment(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["audit", *words])
    assert result.exit_code == 2


def test_an_experiment_without_class_sums_has_no_rows_of_them() -> None:
    config = load_experiment(Request("quickstart", overrides=("method.name=sequential",)))
    assert membership.embedded(config, 0) == []
    assert told_of_sums(config, [], 0, lambda line: None) == []


def test_exact_sums_are_no_class_sums() -> None:
    config = load_experiment(Request("quickstart", overrides=("method.name=linear-probe",)))
    assert membership.class_sums_of(config) is None


ALONE = (
    'data.tasks=["laboratory"]',
    "method.name=sequential",
    "federation.clients=1",
    "federation.rounds=2",
    "data.max_train=16",
    "data.max_test=12",
    "train.max_length=16",
)


def test_adapters_of_every_round_are_attacked(make_experiment, monkeypatch) -> None:
    monkeypatch.setattr(membership, "BUDGETS", (8.0,))
    found = told_of_adapters(make_experiment(*ALONE), 0, 0, lambda event: None)
    assert [(each.seen, each.noise) for each in found] == [
        ("adapter of round 1", "none"),
        ("adapter of round 2", "none"),
        ("adapter of round 1", "ε = 8"),
        ("adapter of round 2", "ε = 8"),
    ]
    for each in found:
        # under a budget, data.max_train takes about so many
        assert (each.members, each.others, each.found) == (
            16 if each.noise == "none" else 9,
            12,
            None,
        )
        assert each.interval[0] <= each.auc <= each.interval[1]


def test_where_the_server_takes_the_steps_no_adapter_leaves() -> None:
    config = load_experiment(Request("private"))
    assert told_of_adapters(config, 0, 0, lambda event: None) == []


@pytest.mark.slow
def test_what_is_learnt_by_heart_is_found(make_experiment, monkeypatch) -> None:
    monkeypatch.setattr(membership, "BUDGETS", ())
    more = ("data.max_train=96", "data.max_test=100", "train.batch_size=8")
    hard = ("train.learning_rate=5e-3", "federation.local_epochs=12", "federation.rounds=1")
    [found] = told_of_adapters(make_experiment(*ALONE, *more, *hard), 0, 0, lambda event: None)
    assert found.interval[0] > 0.55
