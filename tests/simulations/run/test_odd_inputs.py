"""Every bad or odd input has its line, a good one has none; all lines of an input at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import UserError
from simulations.run.check import findings
from simulations.run.findings import Finding
from simulations.run.shipped import shipped_experiments
from tests.simulations.run.odd_inputs import ODD_INPUTS, SMALL_LM, OddInput

ROOT = Path(__file__).parents[3]


def case(odd: OddInput) -> Any:
    """A language model is unpacked first, which takes half a minute."""
    slow = odd.toml.startswith(SMALL_LM)
    return pytest.param(odd, id=odd.what, marks=[pytest.mark.slow] if slow else [])


def found(path: Path, *overrides: str) -> list[Finding]:

    try:
        return list(findings(str(path), overrides))
    except UserError as error:
        return [Finding(problem) for problem in error.problems]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment's data lie beside it, not in the working directory; there is no hub."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("odd", [case(odd) for odd in ODD_INPUTS])
def test_the_line_of_an_input(odd: OddInput, tmp_path: Path) -> None:
    lines = [line for line in found(odd.write(tmp_path)) if line.kind != "note"]
    if not odd.message:
        assert lines == []
        return
    told = [line for line in lines if odd.message in line.text]
    assert len(told) == 1, [line.text for line in lines]
    assert told[0].kind == ("warning" if odd.warns else "error")
    assert "\n" not in told[0].text


def test_all_at_once(tmp_path: Path) -> None:
    odd = OddInput(
        "everything",
        "",
        toml='speed = 1\n[method]\nname = "deel"\n[train]\nlearning_rate = 0.5\n'
        '[wire]\ndtype = "int4"\n[stream]\nscheduel = 3',
        train=(*ROWS_WITH_TWO, ("", "a")),
    )
    lines = [line.text for line in found(odd.write(tmp_path), "adapter.rank=1000")]
    for message in (
        "unknown key 'speed'",
        "unknown key 'stream.scheduel'; did you mean 'schedule'?",
        "column 'text' is empty",
        "train.learning_rate = 0.5",
        "unknown method.name 'deel'",
        "unknown wire.dtype 'int4'",
    ):
        assert sum(message in line for line in lines) == 1, (message, lines)


ROWS_WITH_TWO = (("itch of one", "a"), ("itch of one", "a"), ("rash of two", "b"))


@pytest.mark.parametrize("name", ["quickstart", "private", "per-client", "frugal"])
def test_shipped_experiments_are_in_order(name: str) -> None:
    assert {line.kind for line in findings(name, ())} == {"note"}


def test_no_shipped_experiment_has_an_odd_setting() -> None:
    from deal_core.config.file import parse_experiment, read_toml
    from simulations.run.rows import QUICK

    for name, path in shipped_experiments().items():
        experiment = parse_experiment(read_toml(path), name)
        for check in QUICK[1:]:
            assert list(check.find(experiment) or ()) == []


def test_the_first_answer_needs_no_torch(tmp_path: Path) -> None:
    path = ODD_INPUTS[-1].write(tmp_path)
    (tmp_path / "data" / "ward" / "test.csv").unlink()
    code = (
        "import sys\n"
        "from simulations.run.check import findings\n"
        f"found = findings({str(path)!r}, ())\n"
        "print(next(each.text for each in found if each.kind == 'error'))\n"
        "print(sorted({'torch', 'flwr', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line, modules = done.stdout.splitlines()
    assert "no file for the split 'test'" in line
    assert modules == "[]"


def test_a_fault_of_the_file_does_not_hide_what_is_set(tmp_path: Path) -> None:
    for task in ("a", "b"):
        (tmp_path / "there" / task).mkdir(parents=True)
        for name in ("train", "test"):
            rows = "".join(f'{{"text": "t {n}", "label": "{n % 2}"}}\n' for n in range(40))
            (tmp_path / "there" / task / f"{name}.jsonl").write_text(rows)
    path = tmp_path / "my.toml"
    path.write_text('[train]\nrate = 1\n[data]\nsource = "files"\npath = "gone"\n')
    told = [f.text for f in findings(str(path), (f"data.path={tmp_path / 'there'}",))]
    assert any("rate" in line for line in told)
    assert not any("gone" in line for line in told)
    assert any("task 'a': 40 train" in line for line in told)


def test_one_wrong_value_is_one_line(tmp_path: Path) -> None:
    """What reads the data is not asked where their table is wrong."""
    toml = '[stream]\nschedule = "per-client"\n[stream.orders]\n0 = ["ward"]'
    odd = OddInput("", "", toml=toml, data='split = "a fifth"')
    assert [line.kind for line in found(odd.write(tmp_path))].count("error") == 1
