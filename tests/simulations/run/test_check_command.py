"""`deal check` as a command: exit codes, counts; and `deal simulate`, which checks the same."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deal_core.data import Example, TaskData
from deal_core.data.files import FilesSource
from deal_core.errors import UserError
from simulations.run.check import check
from simulations.run.experiment import Request
from simulations.run.findings import Check, Finding, reading, run_checks
from simulations.run.rows import grouped, odd_rows
from simulations.run.simulate import simulate
from tests.simulations.run.odd_inputs import ROWS, TEST, TESTS, OddInput


def checked(path: Path, *overrides: str, strict: bool = False) -> tuple[int, list[str]]:
    text = io.StringIO()
    code = check(str(path), overrides, strict, Console(file=text, width=160))
    return code, text.getvalue().splitlines()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_warnings_fail_where_they_are_asked_to(tmp_path: Path) -> None:
    path = OddInput("", "").write(tmp_path)
    read = "task 'ward': 80 train and 40 test rows, 2 labels"
    assert checked(path, strict=True) == (0, [read, "nothing is wrong"])
    odd = OddInput("", "", train=(*ROWS, (ROWS[0][0], "b"))).write(tmp_path)
    code, lines = checked(odd)
    assert code == 0
    assert [line.partition(": ")[0] for line in lines[1:]] == ["warning", "no errors, 1 warning"]
    assert checked(odd, strict=True)[0] == 2


def test_errors_fail(tmp_path: Path) -> None:
    path = OddInput("", "", test=(*TESTS, ("itch", "c"))).write(tmp_path)
    code, lines = checked(path, "wire.dtype=int4")
    assert code == 2
    assert lines[-1] == "2 errors, no warnings"
    assert all(line.startswith("error: ") for line in lines[1:-1])


def test_a_task_has_test_rows_or_no_run(tmp_path: Path) -> None:
    """As the clients split it: where records are protected, each record by itself."""
    odd = OddInput("", "", data="split = 0.001", files={TEST: None})
    code, lines = checked(odd.write(tmp_path))
    assert code == 0
    assert lines[0] == "task 'ward': 78 train and 2 test rows, 2 labels"
    code, lines = checked(odd.write(tmp_path), "privacy.mechanism=record")
    assert code == 2
    assert [line for line in lines if line.startswith("error: ")] == [
        "error: task 'ward': data.split = 0.001 leaves no test row; raise it, or add a test file"
    ]


@pytest.mark.parametrize(
    ("held_out", "cure"),
    [(False, "take them out of one side"), (True, "add a test file without them")],
)
def test_a_text_on_both_sides_has_a_cure(held_out: bool, cure: str) -> None:
    """Who lets data.split choose the sides cannot take a row out of one."""
    sides = (Example("itch", "a"),), (Example("itch", "b"),)
    lines = odd_rows(TaskData("ward", ("a", "b"), *sides, held_out=held_out))
    assert f"task 'ward': 1 of 1 test rows have a text that is in training too; {cure}: " in next(
        lines
    )


def test_no_source_may_have_a_task_without_test_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = FilesSource.load
    monkeypatch.setattr(
        FilesSource, "load", lambda source, task: replace(load(source, task), test=())
    )
    code, lines = checked(OddInput("", "").write(tmp_path))
    assert code == 2
    assert "error: task 'ward': no test row; add some, or leave the task out" in lines


def test_a_run_says_all_that_is_wrong_and_does_not_start(tmp_path: Path) -> None:
    path = OddInput("", "", test=(*TESTS, ("itch", "c")), train=(*ROWS, (ROWS[0][0], "b"))).write(
        tmp_path
    )
    text, out = io.StringIO(), tmp_path / "run"
    request = Request(str(path), str(out), ("wire.dtype=int4",))
    with pytest.raises(UserError) as refused:
        simulate(request, Console(file=text, width=160))
    assert len(refused.value.problems) == 2
    assert "no training example has the label 'c'" in refused.value.problems[0]
    assert "unknown wire.dtype 'int4'" in refused.value.problems[1]
    assert "warning: task 'ward': 1 training texts have several labels" in text.getvalue()
    assert not out.exists()


def test_data_of_sites_are_theirs_to_check(tmp_path: Path) -> None:
    path = tmp_path / "sites.toml"
    path.write_text('[data]\nsource = "sites"\nlabels.ward = ["a", "b"]\n')
    code, lines = checked(path)
    assert code == 0
    assert lines == [
        'warning: data.source = "sites": rows are read by deal site check',
        "no errors, 1 warning",
    ]


def test_a_row_is_named_once_for_each_problem() -> None:
    rows = [f"f.csv, row {n}: column 'text' is empty" for n in range(2, 12)]
    assert grouped([*rows, "f.csv, row 3: other", "no file"]) == [
        "f.csv, row 2: column 'text' is empty (and 9 more rows: 3, 4, 5, 6, 7, ...)",
        "f.csv, row 3: other",
        "no file",
    ]


def test_what_rests_on_an_error_is_left_out(make_experiment) -> None:
    def fails(experiment: object) -> None:
        raise UserError("one", "two")

    def warns(experiment: object) -> list[Finding]:
        return [Finding("odd", kind="warning")] * 2

    checks = (
        Check(warns, reading("data"), settles="rows"),
        Check(warns, reading("rows")),
        Check(fails, reading("train"), settles="model"),
        Check(fails, reading("wire")),
        Check(warns, reading("model"), settles="shape"),
        Check(lambda experiment: [Finding("never")], reading("shape")),
        Check(lambda experiment: [Finding("never")], reading("privacy")),
    )
    found = run_checks(checks, make_experiment(), unsound={"privacy"})
    assert [finding.text for finding in found] == ["odd", "one", "two"]


@pytest.mark.parametrize("template", ["x", "{text"])
def test_a_template_without_a_place_for_the_text_is_one_line(tmp_path: Path, template: str) -> None:
    words = ("model.family=causal-lm", "model.name=embedded:smollm2", f"model.template={template}")
    code, lines = checked(OddInput("", "").write(tmp_path), *words)
    assert code == 2
    assert any(line.startswith("error: model.template: ") for line in lines)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.engine=flowr", "error: unknown run.engine 'flowr'; known: flower, inprocess"),
        ('data.instructions={wart="?"}', "warning: data.instructions: there is no task 'wart'"),
        ('data.files={wart={label_column="l"}}', "warning: data.files: there is no task 'wart'"),
    ],
)
def test_a_name_that_is_none_is_told(tmp_path: Path, override: str, line: str) -> None:
    _, lines = checked(OddInput("", "").write(tmp_path), override)
    assert any(each.startswith(line) and "did you mean" in each for each in lines)


def test_names_of_tasks_that_only_sites_have(tmp_path: Path) -> None:
    path = tmp_path / "sites.toml"
    path.write_text('[data]\nsource = "sites"\nlabels = {ward = ["a", "b"]}\n')
    _, lines = checked(path, 'data.instructions={wart="?"}')
    assert any("there is no task 'wart'; did you mean 'ward'?" in line for line in lines)
