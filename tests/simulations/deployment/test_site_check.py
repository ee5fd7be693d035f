"""Ten kinds of broken data folder, ten clear lines; and nothing of it needs a server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.identity import as_the_site_decides
from client.site_file import read_site
from deal_core.config.data import DataConfig
from deal_core.config.experiment import (
    AggregationConfig,
    Experiment,
    ModelConfig,
    PrivacyConfig,
)
from deal_core.config.method import MethodConfig
from deal_core.data.files import SiteSource
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy
from simulations.cli import app
from simulations.deployment.keys import make_authority
from simulations.deployment.site.check import (
    MOST_SKEW,
    Report,
    check_clock,
    check_site,
    check_sums,
    what_leaves,
)
from simulations.deployment.site.folder import init_site
from simulations.run.experiment import Request, load_experiment

AGREED = {"triage": ("a", "b")}
GOOD = [{"text": f"case {n}", "label": "ab"[n % 2]} for n in range(6)]


def jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "triage").mkdir(parents=True)
    for split in ("train", "test"):
        jsonl(data / "triage" / f"{split}.jsonl", GOOD)
    authority = tmp_path / "given.crt"
    authority.write_bytes(make_authority().certificate)
    folder = tmp_path / "site"
    init_site(folder, data, "north", "127.0.0.1:1", authority, labels=AGREED)
    return folder


def asked(labels: dict[str, tuple[str, ...]], **privacy: str) -> Experiment:
    """An experiment that the policy of `deal site init` allows."""
    data = DataConfig(source="sites", labels=labels)
    return Experiment(data=data, privacy=PrivacyConfig(**{"mechanism": "record"} | privacy))


def checked(site: Path, experiment: Experiment | None = None) -> Report:
    return check_site(site, experiment, offline=True)


def test_a_base_model_that_the_site_has_not_agreed_to_is_a_problem(site: Path) -> None:
    experiment = asked(AGREED)
    assert any(
        "base model 'embedded:minilm': agreed" in line for line in checked(site, experiment).lines
    )
    other = experiment.model_copy(update={"model": ModelConfig(name="somebody/else")})
    assert any("does not name 'somebody/else'" in line for line in checked(site, other).problems)


def train(data: Path) -> Path:
    return data / "triage" / "train.jsonl"


def no_folder(data: Path) -> None:
    shutil.rmtree(data)


def no_task(data: Path) -> None:
    shutil.rmtree(data / "triage")


def another_column(data: Path) -> None:
    jsonl(train(data), [{"txt": "case", "label": "a"}])


def no_text(data: Path) -> None:
    jsonl(train(data), [*GOOD, {"text": " ", "label": "a"}])


def empty(data: Path) -> None:
    train(data).write_text("")


def strange_label(data: Path) -> None:
    jsonl(data / "triage" / "test.jsonl", [*GOOD, {"text": "case", "label": "c"}])


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (no_folder, r"data: no such folder; set"),
    "no task": (no_task, r"data: holds no task; make one folder"),
    "another column": (
        another_column,
        r"train.jsonl, row 1: no column 'text'; the columns are: txt, label; did you mean 'txt'",
    ),
    "empty text": (no_text, r"train.jsonl, row 7: column 'text' is empty; fill"),
    "empty file": (empty, r"train.jsonl: holds no examples; add"),
    "strange label": (strange_label, r"test.jsonl, row 7: 'c' is no label of the task"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_data_folder_is_one_clear_line(site: Path, tmp_path: Path, kind: str) -> None:
    spoil, line = BROKEN[kind]
    spoil(tmp_path / "data")
    report = checked(site)
    assert len(report.problems) == 1
    assert "\n" not in report.problems[0]
    with pytest.raises(UserError, match=line):
        raise UserError(report.problems[0])


def test_a_good_site_counts_per_task_and_label_and_says_what_leaves(site: Path) -> None:
    report = checked(site)
    assert report.problems == []
    said = "\n".join(report.lines)
    assert "task 'triage': 6 train, 6 test; train: a 3, b 3" in said
    assert "would leave" in said
    assert "case" not in said


def test_all_that_is_wrong_with_a_task_is_told_beside_what_is_right(site, tmp_path) -> None:
    wrong = [{"text": " ", "label": "a"}, {"text": "case", "label": "z"}]
    jsonl(train(tmp_path / "data"), [*GOOD, wrong[0], *GOOD, *wrong])
    report = checked(site, asked({"triage": ("a", "b")}))
    assert [problem.partition(": ")[2] for problem in report.problems[:2]] == [
        "column 'text' is empty; fill it in or remove the row (and 1 more row: 14)",
        "'z' is no label of the task (they are: a, b); correct it, or map it in label_text",
    ]
    assert "task 'triage': 12 train, 6 test; train: a 6, b 6" in "\n".join(report.lines)


def test_rows_that_are_held_out_are_those_that_the_site_holds_out(site, tmp_path) -> None:
    (tmp_path / "data" / "triage" / "test.jsonl").unlink()
    rows = [{"text": f"case {n}", "label": "ab"[n % 2]} for n in range(40)]
    jsonl(train(tmp_path / "data"), rows)
    site_toml = site / "site.toml"
    site_toml.write_text(site_toml.read_text().replace("[data]", "[data]\nsplit = 0.3", 1))
    report = checked(site)
    own = SiteSource(as_the_site_decides(asked(AGREED), read_site(site_toml)).data).load("triage")
    said = "\n".join(report.lines)
    assert f"task 'triage': {len(own.train)} train, {len(own.test)} test" in said


def test_the_labels_of_an_experiment_are_compared(site: Path) -> None:
    labels = {"triage": ("a", "beta"), "later": ("x", "y")}
    report = checked(site, asked(labels))
    differ, row, _ = report.problems  # of train and of test
    assert "[data.labels] of site.toml: 'triage' differs, 'later' is missing" in differ
    assert "row 2: 'b' is no label of the task (they are: a, beta" in row
    assert any("'later': no folder; this site sits it out" in line for line in report.lines)


def test_an_experiment_that_the_policy_refuses_is_told(site: Path) -> None:
    labels = {"triage": ("a", "b")}
    (problem,) = checked(site, asked(labels, mechanism="none")).problems
    assert "'none', but the site's policy demands 'record'" in problem
    assert any(
        "the policy allows the experiment" in line for line in checked(site, asked(labels)).lines
    )


def test_what_the_site_would_refuse_in_the_first_round_is_told_before(site: Path) -> None:
    """Another instruction, and another clipping bound than the policy allows."""
    labels, path = {"triage": ("a", "b")}, site / "site.toml"
    own = path.read_text()
    words = '[data.instructions]\ntriage = "How urgent?"\n[policy] '
    path.write_text(own.replace("[policy] ", words, 1))
    agreed = asked(labels)
    data = agreed.data.model_copy(update={"instructions": {"triage": "Whose?"}})
    (problem,) = checked(site, agreed.model_copy(update={"data": data})).problems
    assert "task 'triage' has another instruction" in problem
    path.write_text(own.replace("\nmechanism = ", "\nmax_grad_norm = 0.5\nmechanism = ", 1))
    (problem,) = checked(site, agreed).problems
    assert "the site's policy allows 0 to 0.5" in problem


def test_what_becomes_of_sums_is_told_and_a_method_made_of_them_needs_them(site: Path) -> None:
    labels = {"triage": ("a", "b")}
    agreed, path = asked(labels, mechanism="none"), site / "site.toml"
    demands = re.compile(r"^(mechanism|max_epsilon) = .*\n", re.MULTILINE)
    path.write_text(demands.sub("", path.read_text()))
    several = agreed.federation.model_copy(update={"clients": 3, "sites": ("a", "b", "c")})
    agreed = agreed.model_copy(update={"federation": several})
    report = checked(site, agreed)
    assert any("they stay here (policy.share_sums)" in line for line in report.lines)
    prototype = agreed.method.model_copy(update={"name": "prototype"})
    alone = agreed.model_copy(update={"method": prototype})
    (problem,) = [each for each in checked(site, alone).problems if "share_sums" in each]
    assert "set policy.share_sums to true" in problem
    path.write_text(path.read_text().replace("share_sums = false", "share_sums = true", 1))
    report = checked(site, agreed)
    assert (
        "the experiment asks for class sums: they leave under masks, once for each task, with a "
        "noise multiplier of 0.61"
    ) in report.lines


def test_a_method_made_of_exact_sums_is_for_simulations(site: Path) -> None:
    agreed = asked({"triage": ("a", "b")}, mechanism="none")
    own = read_site(site / "site.toml").model_copy(update={"policy": Policy(share_sums=True)})
    exact = agreed.model_copy(update={"method": MethodConfig(name="linear-probe")})
    with pytest.raises(UserError, match="exact sums, which tell who is in them"):
        list(check_sums(own, exact))


def test_sums_with_noise_leave_a_site_that_shares_none(site: Path) -> None:
    """A mechanism protects the records in them, and the ledger is charged."""
    shipped = load_experiment(Request("private-sums"))
    labels = {"triage": ("a", "b")}
    agreed = shipped.model_copy(update={"data": DataConfig(source="sites", labels=labels)})
    own = read_site(site / "site.toml")
    lines = list(check_sums(own, agreed))
    assert lines == [
        "the experiment asks for class sums: they leave under masks, with noise, charged"
    ]
    weak = agreed.privacy.model_copy(update={"target_epsilon": 200.0})
    with pytest.raises(UserError, match=r"set policy.share_sums to true"):
        list(
            check_sums(
                own.model_copy(update={"policy": Policy(mechanism="record")}),
                agreed.model_copy(update={"privacy": weak}),
            )
        )


def test_how_sums_would_leave_follows_from_what_the_policy_demands(site: Path) -> None:
    own = read_site(site / "site.toml")
    for policy, told in (
        (Policy(mechanism="record", noise_share="sum"), "with noise, charged"),
        (Policy(mechanism="record", share_sums=True), "with noise, charged"),
        (Policy(share_sums=True), "with noise, once for each task"),
        (Policy(), "none leaves"),
    ):
        (line,) = (
            line
            for line in what_leaves(own.model_copy(update={"policy": policy}))
            if line.startswith("class sums")
        )
        assert told in line


@pytest.mark.parametrize("declared", [True, False])
def test_the_lines_that_are_printed_make_the_labels_agree(site: Path, declared: bool) -> None:
    """Also with names that TOML must quote."""
    labels = {"triage": ("a", "b"), 'a "rare" task': ("x, y", "z]")}
    agreed = asked(labels)
    path = site / "site.toml"
    if not declared:
        head, _, rest = path.read_text().partition("[data.labels]")
        path.write_text(head + rest[rest.index("[compute]") :])
    (problem,) = checked(site, agreed).problems
    lines = problem.partition(":\n")[2]
    assert lines.startswith("[data.labels]\n") == (not declared)
    text = path.read_text()
    where = '"triage" = ["a", "b"]\n' if declared else "[compute]"
    changed = f"{where}{lines}\n" if declared else f"{lines}\n{where}"
    path.write_text(text.replace(where, changed))
    assert read_site(path).data.labels == labels
    assert checked(site, agreed).problems == []


def test_a_site_that_declares_no_task_is_told_so(site: Path) -> None:
    path = site / "site.toml"
    head, _, rest = path.read_text().partition("[data.labels]")
    path.write_text(head + rest[rest.index("[compute]") :])
    (problem,) = checked(site).problems
    assert "takes part in no task; deal site check --experiment FILE prints the lines" in problem


def test_a_key_that_others_can_read_is_refused(site: Path) -> None:
    (site / "site.key").chmod(0o644)
    assert "others can read this private key; run chmod 600" in checked(site).problems[0]


def test_without_a_server_there_is_one_line(site: Path) -> None:
    problems = check_site(site).problems
    assert len(problems) == 1
    assert problems[0].startswith("127.0.0.1:1: no connection")


@pytest.mark.parametrize("skew", [MOST_SKEW + 1, -MOST_SKEW - 1])
def test_clocks_that_differ_are_named(skew: float) -> None:
    word = "behind" if skew > 0 else "ahead of"
    with pytest.raises(UserError, match=f"the clock here is 11 s {word} the server's.*NTP"):
        list(check_clock(skew))
    assert list(check_clock(skew / 2)) == ["clock: agrees with the server's"]


def of_patients(site: Path, name: str = "patient_id", empty: bool = False) -> None:
    """Two records of each patient, the same in training and test."""
    rows = [{**row, name: "" if empty and n == 5 else f"p{n // 2}"} for n, row in enumerate(GOOD)]
    for split in ("train", "test"):
        jsonl(site.parent / "data" / "triage" / f"{split}.jsonl", rows)


def with_unit(site: Path, column: str) -> None:
    file = site / "site.toml"
    text = file.read_text()
    file.write_text(text.replace("[policy] ", f'[policy]\nunit_column = "{column}" ', 1))
    assert read_site(file).policy.unit_column == column


def test_a_column_that_names_people_who_repeat_is_warned_of(site):
    of_patients(site)
    report = checked(site)
    assert report.problems == []
    (warning,) = report.warnings
    assert "column 'patient_id' of task 'triage' has 3 values in 6 training rows" in warning
    assert "set policy.unit_column = 'patient_id'" in warning


def test_counts_in_the_clear_are_warned_of(site):
    assert not [each for each in checked(site).warnings if "metrics" in each]
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace('metrics = "none"', 'metrics = "clear"'))
    (warning,) = [each for each in checked(site).warnings if "metrics" in each]
    assert warning.startswith('policy.metrics = "clear": a crafted head or adapter can name')


def test_nobody_is_warned_of_a_column_that_is_the_unit_or_names_nobody(site):
    of_patients(site, "ward")
    assert checked(site).warnings == []
    of_patients(site)
    with_unit(site, "patient_id")
    report = checked(site)
    assert report.problems == []
    (warning,) = report.warnings
    assert "3 groups have training and test records" in warning
    assert any("6 train of 3 groups" in line for line in report.lines)


@pytest.mark.parametrize(
    ("name", "empty", "problem"),
    [
        ("patient_id", True, "row 6: column 'patient_id' is empty"),
        (
            "ward",
            False,
            ".jsonl, row 1: no column 'patient_id'; the columns are: text, label, ward (and 5 more",
        ),
    ],
)
def test_a_unit_column_that_is_not_there_is_wrong(site, name, empty, problem):
    of_patients(site, name, empty)
    with_unit(site, "patient_id")
    found = checked(site).problems
    assert len(found) == 2  # of train and of test
    assert all(problem in each for each in found)


def test_units_of_site_and_experiment_are_compared(site):
    of_patients(site)
    labels = {"source": "sites", "labels": {"triage": list(AGREED["triage"])}}
    records = Experiment.model_validate({"data": labels, "privacy": {"mechanism": "record"}})
    groups = Experiment.model_validate(
        {"data": labels, "privacy": {"mechanism": "record", "unit_column": "person"}}
    )
    assert checked(site, records).problems == []
    (found,) = checked(site, groups).problems
    assert "policy.unit_column" in found
    with_unit(site, "patient_id")
    report = checked(site, groups)
    assert report.problems == []
    assert any("unit of privacy: group of 'patient_id'" in line for line in report.lines)
    (found,) = checked(site, records).problems
    assert "demands groups of 'patient_id'" in found


def test_a_site_with_few_test_rows_knows_that_its_counts_are_in_no_sum(site: Path) -> None:
    labels = {"triage": ("a", "b")}
    plain = asked(labels, metrics="summed")
    secure = plain.model_copy(update={"aggregation": AggregationConfig(secure=True)})
    (told,) = [line for line in checked(site, secure).warnings if "evaluations out" in line]
    assert told.startswith(f"task 'triage': {len(GOOD)} test rows")
    assert "policy.min_records = 32" in told
    assert not any("evaluations out" in line for line in checked(site, plain).warnings)


@pytest.mark.parametrize("text", ["", "<html>not found</html>"])
def test_a_certificate_that_is_none_is_told_and_nothing_of_the_rest_is_lost(
    site: Path, text: str
) -> None:
    (site / "ca.crt").write_text(text)
    report = check_site(site, None, offline=False)
    assert any("ca.crt" in line for line in report.problems)
    assert any("task 'triage'" in line for line in report.lines)


def test_a_state_folder_elsewhere_is_its_owners_alone(site: Path, tmp_path: Path) -> None:
    state = tmp_path / "elsewhere"
    state.mkdir(mode=0o755)
    path = site / "site.toml"
    path.write_text(path.read_text().replace('state = "state"', f'state = "{state}"', 1))
    checked(site)
    assert state.stat().st_mode & 0o777 == 0o700


def test_what_does_not_take_place_is_a_note_and_not_ok(site: Path) -> None:
    result = CliRunner().invoke(app, ["site", "check", str(site), "--offline"])
    (line,) = [each for each in result.output.splitlines() if "secure sums:" in each]
    assert line.startswith("note   secure sums: not possible here: ")
    assert "ok     key " in result.output
