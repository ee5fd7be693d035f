"""`deal check`: every bad or odd input has its line, a good one has none, and all lines come at
once; `deal simulate` checks the same."""

import io
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from deal_core.config.file import parse_experiment, read_toml
from deal_core.data import Example, TaskData
from deal_core.errors import UserError
from simulations.output import shipped_experiments
from simulations.run.check import check, findings
from simulations.run.experiment import Request, load_experiment
from simulations.run.quick_checks import (
    CLEAR_COUNTS,
    check_privacy,
    check_training,
    check_worth,
    grouped,
    odd_rows,
)
from simulations.run.simulate import simulate

ROOT = Path(__file__).parents[3]
Rows = Iterable[tuple[str, str]]
WORDS = ("fever", "cough", "rash", "ache")
ROWS = tuple((f"{word} of patient {n}", "ab"[n % 2]) for n in range(20) for word in WORDS)
TESTS = tuple((f"{word} of visitor {n}", "ab"[n % 2]) for n in range(10) for word in WORDS)
TRAIN, TEST = "data/ward/train.csv", "data/ward/test.csv"
SMALL_LM = '[model]\nfamily = "causal-lm"\nname = "embedded:smollm2"\n'
RECORD = '[privacy]\nmechanism = "record"\n'


def table(rows, separator=","):
    return "".join(f"{text}{separator}{label}\n" for text, label in (("text", "label"), *rows))


@dataclass(frozen=True)
class Odd:
    """The good input, changed. ``files``: other content by path; None: the file is not there."""

    message: str = ""
    toml: str = ""
    data: str = ""
    train: Rows = ROWS
    test: Rows = TESTS
    files: dict[str, str | None] = field(default_factory=dict)

    def write(self, folder):
        """Write everything below ``folder``; return the experiment file."""
        content = {
            "own.toml": f'{self.toml}\n[data]\nsource = "files"\npath = "data"\n{self.data}\n',
            TRAIN: table(self.train),
            TEST: table(self.test),
            **self.files,
        }
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                (folder / name).write_text(text)
        return folder / "own.toml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The experiment's data lie beside it, not in the working directory; there is no hub."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


NUMBERED = {
    split: [(t, "12"[b == "b"]) for t, b in rows]
    for split, rows in (("train", ROWS), ("test", TESTS))
}
GOOD = {
    "marks": Odd(files={TRAIN: "\ufeff" + table(ROWS, ";"), TEST: table(TESTS, "\t")}),
    "data.split": Odd(data="split = 0.3", files={TEST: None}),
    "numbers with names": Odd(
        data='[data.files.ward]\nlabel_text = {1 = "at home", 2 = "in bed"}', **NUMBERED
    ),
    "numbers that nothing reads": Odd(
        toml='[method]\nname = "prototype"\n[federation]\nclients = 3', **NUMBERED
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_input_has_no_line(name, tmp_path):
    assert [each for each in findings(str(GOOD[name].write(tmp_path)), ()) if bad(each)] == []


def test_a_note_says_what_training_is_worth():
    answers = {"quickstart": "labels", "quickstart-llm": "texts", "private-sums": None}
    for name, kind in answers.items():
        notes = [each.text for each in check_worth(load_experiment(Request(name)))]
        assert [kind in note for note in notes] == [True] * (kind is not None)


def bad(finding):
    return finding.kind != "note"


ERRORS = (
    Odd("unknown key 'model.rank'; did you mean 'adapter.rank'?", toml="[model]\nrank = 4"),
    Odd("set data.split = 0.2 to take it from the training file", files={TEST: None}),
    Odd('run.device = "cuda:7": torch sees no such GPU', toml='[run]\ndevice = "cuda:7"'),
    Odd("'mps' is no device: set auto, cpu, cuda or cuda:N", toml='[run]\ndevice = "mps"'),
    Odd("unknown method.name 'deel'", toml='[method]\nname = "deel"'),
    Odd("unknown task in", data='tasks = ["wrad"]'),
    Odd("'c' is no label of the task", test=(*TESTS, ("itch", "c"))),
    Odd(
        "task 'ward': data.split = 0.3 leaves no test row; raise it, or add a test file",
        data="split = 0.3",
        train=[(f"the same {b}", b) for _, b in ROWS],
        files={TEST: None},
    ),
    Odd("80 training examples for 500 clients", toml="[federation]\nclients = 500"),
    Odd(
        "model.name 'nobody/nothing': cannot load this name (",
        toml='[model]\nname = "nobody/nothing"',
    ),
    Odd("train.max_length = 4000: the model reads 512", toml="[train]\nmax_length = 4000"),
    Odd(
        'which has query, key, value, dense: try ["query", "value"]',
        toml='[adapter]\ntarget_modules = ["nothing"]',
    ),
    Odd("privacy.target_delta = 0.01 is too large for", toml=RECORD + "target_delta = 0.01"),
    Odd("unknown run.engine 'flowr'; known: flower, inprocess", toml='[run]\nengine = "flowr"'),
    Odd(
        "its prompt has ",
        toml=SMALL_LM + "[federation]\nrounds = 1",
        data='instructions.ward = "' + "Answer well. " * 4000 + '"',
    ),
)
LONG = "rest and drink" * 9
NO_WORDS = ("NaN", "None", "True", "2024-01-31")
WARNINGS = (
    Odd("2 rows have no text or no answer, and are left out", train=(("", "a"), ("x", ""), *ROWS)),
    Odd("1 texts have NUL bytes", train=(*ROWS, ("itch\0", "a"))),
    Odd("a text has 4800000 characters", train=(*ROWS, ("itch" * 1_200_000, "a"))),
    Odd(
        "labels '2024-01-31', 'NaN', 'None', 'True': a missing value, a date or a truth",
        train=(*ROWS, *((f"{n}", label) for n, label in enumerate(NO_WORDS))),
    ),
    Odd("10 of 50 test rows have a text that is in training too", test=(*TESTS, *ROWS[:10])),
    Odd("1 training texts have several labels", train=(*ROWS, (ROWS[0][0], "b"))),
    Odd("labels 'A', 'a' look alike", train=(*ROWS, ("itch", "A"), ("burn", "A"))),
    Odd("its labels are numbers ('1', '2'), and the model reads", **NUMBERED),
    Odd(
        "one label ('a'): there is nothing to tell apart",
        train=[(t, "a") for t, _ in ROWS],
        test=[(t, "a") for t, _ in TESTS],
    ),
    Odd("fewer than 2 training rows of: z", train=(*ROWS, ("itch", "z"))),
    Odd(
        "80 of 80 texts looked at have more than train.max_length = 128 tokens",
        train=[(t + " pain" * 200, b) for t, b in ROWS],
    ),
    Odd(
        "40 of 80 answers looked at have more than model.max_new_tokens = 8 tokens",
        toml=SMALL_LM + "max_new_tokens = 8",
        data='generation = ["ward"]\ntarget_column = "label"',
        train=[(t, LONG if b == "a" else "rest and drink") for t, b in ROWS],
        test=[(t, LONG) for t, _ in TESTS],
    ),
    Odd("train.learning_rate = 0.5 is large for AdamW", toml="[train]\nlearning_rate = 0.5"),
    Odd("privacy.target_epsilon = 100 is above 20", toml=RECORD + "target_epsilon = 100.0"),
    Odd("privacy.target_epsilon is set, and privacy.mech", toml="[privacy]\ntarget_epsilon = 1"),
    Odd("data.files: there is no task 'wart'; did you", data='files.wart.label_column = "l"'),
    Odd(
        "if that is who the column names, set privacy.unit_column = 'patient_id'",
        toml=RECORD,
        files={
            TRAIN: "text,label,patient_id\n"
            + "".join(f"{t},{b},{n // 4}\n" for n, (t, b) in enumerate(ROWS))
        },
    ),
)


def case(odd, kind):
    """A language model is unpacked first, which takes half a minute."""
    slow = [pytest.mark.slow] if odd.toml.startswith(SMALL_LM) else []
    return pytest.param(odd, kind, id=odd.message[:40], marks=slow)


@pytest.mark.parametrize(
    ("odd", "kind"),
    [*(case(odd, "error") for odd in ERRORS), *(case(odd, "warning") for odd in WARNINGS)],
)
def test_the_line_of_an_input(odd, kind, tmp_path):
    """The first that is bad; what takes longer is not waited for."""
    found = next(filter(bad, findings(str(odd.write(tmp_path)), ())))
    assert odd.message in found.text
    assert found.kind == kind
    assert "\n" not in found.text


@pytest.fixture
def checked(tmp_path):
    """Exit code and lines of the command."""

    def run(odd, *overrides, strict=False):
        text = io.StringIO()
        path = str(odd.write(tmp_path))
        code = check(path, overrides, strict, Console(file=text, width=160))
        return code, text.getvalue().splitlines()

    return run


def test_all_at_once_each_once_and_the_exit_code(checked):
    """What takes longer is left out where something is wrong by then."""
    odd = Odd(
        toml='[method]\nname = "deel"\n[train]\nlearning_rate = 0.5\n[adapter]\nkind = "lera"',
        train=(("itch of one", "a"), ("itch of one", "a"), ("rash of two", "b"), ("\0", "a")),
    )
    code, lines = checked(odd, "federation.clients=1000")
    assert code == 2
    for message in (
        "1 texts have NUL bytes",
        "warning: train.learning_rate = 0.5",
        "error: unknown method.name 'deel'",
        "error: unknown adapter.kind 'lera'",
    ):
        assert sum(message in line for line in lines) == 1, (message, lines)
    assert not any("1000 clients" in line for line in lines)
    assert lines[-1] == "2 errors, 3 warnings"
    keys = Odd(toml="speed = 1\n[stream]\nscheduel = 3", data='split = "a fifth"')
    assert checked(keys)[1][-1] == "3 errors, no warnings"


def test_warnings_fail_where_they_are_asked_to(checked, tmp_path):
    read = "task 'ward': 80 train and 40 test rows, 2 labels"
    code, lines = checked(Odd(), strict=True)
    assert (code, lines[0], lines[-1]) == (0, read, "nothing is wrong")
    odd = Odd(train=(*ROWS, (ROWS[0][0], "b")))
    code, lines = checked(odd)
    assert code == 0
    assert sum(line.startswith("warning: ") for line in lines) == 1
    assert lines[-1] == "no errors, 1 warning"
    assert checked(odd, strict=True)[0] == 2
    (tmp_path / "own.toml").write_text("# nothing yet\n")
    first = next(findings(str(tmp_path / "own.toml"), ()))
    assert (first.kind, "is empty, so it is what all keys" in first.text) == ("warning", True)


def test_a_run_says_all_that_is_wrong_and_does_not_start(tmp_path):
    odd = Odd(test=(*TESTS, ("itch", "c")), train=(*ROWS, (ROWS[0][0], "b")))
    text, out = io.StringIO(), tmp_path / "run"
    request = Request(str(odd.write(tmp_path)), str(out), ("adapter.kind=lera",))
    with pytest.raises(UserError) as refused:
        simulate(request, Console(file=text, width=160))
    first, second = refused.value.problems
    assert "'c' is no label of the task" in first
    assert "unknown adapter.kind 'lera'" in second
    assert "warning: task 'ward': 1 training texts have several labels" in text.getvalue()
    assert not out.exists()


def test_data_of_sites_are_theirs_to_check(tmp_path):
    path = tmp_path / "sites.toml"
    path.write_text('[data]\nsource = "sites"\nlabels.ward = ["a", "b"]\n')
    assert [each.text for each in findings(str(path), ()) if bad(each)] == [
        'data.source = "sites": rows are read by deal site check'
    ]
    found = findings(str(path), ('data.instructions={wart="?"}',))
    assert any("there is no task 'wart'; did you mean 'ward'?" in each.text for each in found)


@pytest.mark.parametrize(
    ("source", "metrics", "said"),
    [("sites", "clear", True), ("sites", "summed", False), ("medmcqa", "clear", False)],
)
def test_counts_in_the_clear_are_said_of_sites(source, metrics, said):
    """A crafted head can name test records by them."""
    tables = {"data": {"source": source}, "privacy": {"metrics": metrics}}
    found = [finding.text for finding in check_privacy(parse_experiment(tables, "test"))]
    assert any(CLEAR_COUNTS in text for text in found) == said


@pytest.mark.parametrize(
    ("held_out", "cure"),
    [(False, "take them out of one side"), (True, "add a test file without them")],
)
def test_a_text_on_both_sides_has_a_cure(held_out, cure):
    """Who lets data.split choose the sides cannot take a row out of one."""
    sides = (Example("itch", "a"),), (Example("itch", "b"),)
    lines = odd_rows(TaskData("ward", ("a", "b"), *sides, held_out=held_out))
    assert f"1 of 1 test rows have a text that is in training too; {cure}: " in next(lines)


def test_a_row_is_named_once_for_each_problem():
    rows = [f"f.csv, row {n}: column 'text' is empty" for n in range(2, 12)]
    assert grouped([*rows, "f.csv, row 3: other", "no file"]) == [
        "f.csv, row 2: column 'text' is empty (and 9 more rows: 3, 4, 5, 6, 7, ...)",
        "f.csv, row 3: other",
        "no file",
    ]


def test_no_shipped_experiment_has_an_odd_setting():
    for name, path in shipped_experiments().items():
        experiment = parse_experiment(read_toml(path), name)
        assert [*check_training(experiment), *check_privacy(experiment)] == []


def test_the_first_answer_needs_no_torch(tmp_path):
    path = Odd(files={TEST: None}).write(tmp_path)
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
