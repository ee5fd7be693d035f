"""Membership in class sums: the attack on embedded texts finds members as well as the closed form
expects."""

from __future__ import annotations

import io
import json
from functools import cache

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.training.evaluation import base_embeddings
from deal_core.training.public_subspace import principal
from simulations.audit import membership, sums_told
from simulations.audit.membership import MembershipAudit, MembershipRequest, run_membership
from simulations.audit.sums_told import Rows, Told, as_added, noises, told_of_sums
from simulations.cli import app
from simulations.report.commands import write_report
from simulations.run.experiment import Request, load_experiment
from tests.conftest import load_once

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
        patch.setattr(sums_told, "SIZES", (20, 40))
        patch.setattr(sums_told, "DRAWS", 17)
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
    monkeypatch.setattr(sums_told, "DRAWS", 1)
    few = told_of_sums(load_experiment(Request("quickstart")), texts(), 0, lambda line: None)
    assert few
    assert all(each.others < 1000 and each.found is None for each in few)
    assert "n too small" in "\n".join(membership.told_table(few))


def test_noise_is_that_of_a_run() -> None:
    """Four sites, of which a sum needs three and one may collude: 0.61 is the noise of two."""
    config = load_experiment(Request("quickstart"))
    statistics = sums_told.class_sums_of(config)
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
    screen = Console(file=io.StringIO(), width=120)
    assert run_membership(MembershipRequest(out=str(tmp_path)), screen) == 0
    audit = MembershipAudit.model_validate_json((tmp_path / membership.FILE).read_text())
    assert audit.told == list(told())
    assert audit.directions == DIRECTIONS
    assert "sum over sites (server)" in write_report(tmp_path).read_text()
    assert json.loads((tmp_path / membership.FILE).read_text())["experiment"] == "quickstart"


@pytest.mark.parametrize("words", [["membership", "a", "b"], ["budgets", "quickstart"]])
def test_the_command_names_one_experiment(words: list[str]) -> None:
    result = CliRunner().invoke(app, ["audit", *words])
    assert result.exit_code == 2


def test_an_experiment_without_class_sums_is_refused() -> None:
    config = load_experiment(Request("quickstart", overrides=("method.name=sequential",)))
    with pytest.raises(UserError, match="no class sums"):
        sums_told.embedded(config, 0)


def test_exact_sums_are_no_class_sums() -> None:
    config = load_experiment(Request("quickstart", overrides=("method.name=linear-probe",)))
    assert sums_told.class_sums_of(config) is None
