"""Bad and odd inputs, and the line that `deal check` says of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

FIELD = ("fever", "cough", "rash", "ache")
ROWS = tuple((f"{word} of patient {n}", "ab"[n % 2]) for n in range(20) for word in FIELD)
TESTS = tuple((f"{word} of visitor {n}", "ab"[n % 2]) for n in range(10) for word in FIELD)

NUMBERS = {"a": "1", "b": "2"}
NUMBERED, NUMBERED_TESTS = (
    tuple((text, NUMBERS[label]) for text, label in rows) for rows in (ROWS, TESTS)
)


def table(rows: tuple[tuple[str, str], ...], separator: str = ",") -> str:
    return (
        separator.join(("text", "label"))
        + "\n"
        + "".join(separator.join(row) + "\n" for row in rows)
    )


@dataclass(frozen=True)
class OddInput:
    """One input: the good one, changed.

    Attributes:
        what: in words, for the table.
        message: part of the line that is said; empty: nothing is.
        toml: replaces tables of the experiment file; its text stands before ``[data]``.
        data: text of the table [data], besides source and path.
        train, test: rows of the files.
        files: other content by path, over the good files; None: the file is not there.
        warns: the line is a warning.
    """

    what: str
    message: str
    toml: str = ""
    data: str = ""
    train: tuple[tuple[str, str], ...] = ROWS
    test: tuple[tuple[str, str], ...] = TESTS
    files: dict[str, bytes | str | None] = field(default_factory=dict)
    warns: bool = False

    def write(self, folder: Path) -> Path:
        """Write everything below ``folder``; return the experiment file."""
        content: dict[str, bytes | str | None] = {
            "own.toml": f'{self.toml}\n[data]\nsource = "files"\npath = "data"\n{self.data}\n',
            "data/ward/train.csv": table(self.train),
            "data/ward/test.csv": table(self.test),
            **self.files,
        }
        for name, text in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is not None:
                path.write_bytes(text.encode() if isinstance(text, str) else text)
        return folder / "own.toml"


def own(text: str) -> dict[str, bytes | str | None]:
    return {"own.toml": text}


TRAIN, TEST = "data/ward/train.csv", "data/ward/test.csv"
SEMICOLONS: dict[str, bytes | str | None] = {
    TRAIN: table(ROWS, ";"),
    TEST: table(TESTS, "\t"),
}
GOOD_TOML = '[data]\nsource = "files"\npath = "data"\n'
SMALL_LM = '[model]\nfamily = "causal-lm"\nname = "embedded:smollm2"\n'

ODD_INPUTS = (
    OddInput("a good experiment", ""),
    OddInput("fields separated by semicolons, and by tabs", "", files=SEMICOLONS),
    OddInput("a byte-order mark in the TOML file", "", files=own("\ufeff" + GOOD_TOML)),
    OddInput("a byte-order mark in the CSV file", "", files={TRAIN: "\ufeff" + table(ROWS)}),
    OddInput("no test file, `data.split = 0.3`", "", data="split = 0.3", files={TEST: None}),
    OddInput(
        "no test file", "set data.split = 0.2 to take it from the training file", files={TEST: None}
    ),
    OddInput(
        "a key without its table",
        "unknown key 'learning_rate'; did you mean 'train.learning_rate'",
        toml="learning_rate = 0.01",
    ),
    OddInput(
        "a key in another table",
        "unknown key 'model.rank'; did you mean 'adapter.rank'?",
        toml="[model]\nrank = 4",
    ),
    OddInput(
        "a key misspelt",
        "unknown key 'train.learnin_rate'; did you mean 'learning_rate'?",
        toml="[train]\nlearnin_rate = 0.01",
    ),
    OddInput(
        "a value of the wrong type",
        "key 'adapter.rank' should be integer, but is \"four\"",
        toml='[adapter]\nrank = "four"',
    ),
    OddInput("a TOML file that is none", "not valid TOML", files=own("[run\n")),
    OddInput("a method misspelt", "unknown method.name 'deel'", toml='[method]\nname = "deel"'),
    OddInput(
        "a folder that is not there",
        "no such folder; set data.path",
        files=own(GOOD_TOML.replace('"data"', '"nowhere"')),
    ),
    OddInput("a task that is not there", "unknown task in", data='tasks = ["wrad"]'),
    OddInput(
        "a column that is not there",
        "train.csv: no column 'txt'; the columns are: text, label; set data.text_column",
        data='text_column = "txt"',
    ),
    OddInput(
        "a header of other names",
        "train.csv: no column 'text' or 'label'; the columns are: Text, Label; set "
        "data.text_column and data.label_column",
        files={TRAIN: table(ROWS).replace("text,label", "Text,Label", 1)},
    ),
    OddInput(
        "an empty text in two rows",
        "row 2: column 'text' is empty; fill it in or remove the row (and 1 more row",
        files={TRAIN: table((("", "a"), ("", "b"), *ROWS))},
    ),
    OddInput(
        "a label of the test file that training lacks",
        "no training example has the label 'c'",
        test=(*TESTS, ("itch", "c")),
    ),
    OddInput(
        "a row with a field too many",
        "row 2: 3 fields, but the header has 2",
        files={TRAIN: "text,label\na,b,c\n"},
    ),
    OddInput(
        "a file that is not UTF-8",
        "not UTF-8 text; save the file as UTF-8",
        files={TRAIN: table(ROWS).encode("utf-16")},
    ),
    OddInput(
        "a file of JSON that is not one object a line",
        "not valid JSON",
        files={TRAIN: None, "data/ward/train.jsonl": json.dumps([1], indent=1)},
    ),
    OddInput(
        "an Excel file without openpyxl, or damaged",
        "train.xlsx: ",
        files={TRAIN: None, "data/ward/train.xlsx": b"PK"},
    ),
    OddInput("an empty file", "holds no examples", files={TEST: "text,label\n"}),
    OddInput(
        "no test file, and a split that leaves no test row",
        "task 'ward': data.split = 0.3 leaves no test row; raise it, or add a test file",
        data="split = 0.3",
        train=tuple((f"the same {b}", b) for _, b in ROWS),
        files={TEST: None},
    ),
    OddInput(
        "a column that occurs twice",
        "row 1: column 'label' occurs twice; rename one",
        files={TRAIN: "text,label,label\na,b,c\n"},
    ),
    OddInput(
        "two files for one split",
        "several files for the split 'train'",
        files={"data/ward/train.jsonl": '{"text": "x", "label": "a"}\n'},
    ),
    OddInput(
        "more clients than rows",
        "80 training examples for 500 clients",
        toml="[federation]\nclients = 500",
    ),
    OddInput(
        "a model that is nowhere",
        "model.name 'nobody/nothing': cannot load this name (",
        toml='[model]\nname = "nobody/nothing"',
    ),
    OddInput(
        "a text longer than the model's positions",
        "train.max_length = 4000: the model reads 512 tokens",
        toml="[train]\nmax_length = 4000",
    ),
    OddInput(
        "a target module that is not there",
        "adapter.target_modules: Target modules {'nothing'} not found",
        toml='[adapter]\ntarget_modules = ["nothing"]',
    ),
    OddInput(
        "test rows that are in training",
        "10 of 50 test rows have a text that is in training too",
        test=(*TESTS, *ROWS[:10]),
        warns=True,
    ),
    OddInput(
        "a text with two labels",
        "1 training texts have several labels",
        train=(*ROWS, (ROWS[0][0], "b")),
        warns=True,
    ),
    OddInput(
        "labels that differ by case",
        "labels 'A', 'a' look alike, and are different ones",
        train=(*ROWS, ("itch", "A"), ("burn", "A")),
        warns=True,
    ),
    OddInput(
        "a declared label with blanks around it",
        "data.labels.ward: the label 'b ' with blanks around it; remove them",
        data='labels.ward = ["a", "b", "b "]',
    ),
    OddInput(
        "labels that are numbers",
        "its labels are numbers ('1', '2'), and the model reads labels as words; set "
        "data.files.ward.label_text to their names",
        train=NUMBERED,
        test=NUMBERED_TESTS,
        warns=True,
    ),
    OddInput(
        "labels that are numbers, and `data.files.ward.label_text`",
        "",
        data='[data.files.ward]\nlabel_text = {1 = "at home", 2 = "in bed"}',
        train=NUMBERED,
        test=NUMBERED_TESTS,
    ),
    OddInput(
        "labels that are numbers, where no name is read",
        "",
        toml='[method]\nname = "prototype"\n[federation]\nclients = 3',
        train=NUMBERED,
        test=NUMBERED_TESTS,
    ),
    OddInput(
        "a task with one label",
        "one label ('a'): there is nothing to tell apart",
        train=tuple((t, "a") for t, _ in ROWS),
        test=tuple((t, "a") for t, _ in TESTS),
        warns=True,
    ),
    OddInput(
        "a label column of texts",
        "is label_column one of texts?",
        train=tuple((b, t) for t, b in ROWS),
        test=tuple((b, t) for t, b in ROWS[:30]),
        warns=True,
    ),
    OddInput(
        "a text column that is nearly empty",
        "80 of 80 training texts have fewer than 3 characters",
        train=tuple(("-", b) for _, b in ROWS),
        warns=True,
    ),
    OddInput(
        "a label with one row",
        "fewer than 2 training rows of: z",
        train=(*ROWS, ("itch", "z")),
        warns=True,
    ),
    OddInput(
        "few test rows", "4 test rows: one answer is 25 % of accuracy", test=TESTS[:4], warns=True
    ),
    OddInput(
        "texts longer than is read",
        "80 of 80 texts looked at have more than train.max_length = 128 tokens",
        train=tuple((t + " pain" * 200, b) for t, b in ROWS),
        warns=True,
    ),
    OddInput(
        "answers longer than is written",
        "40 of 80 answers looked at have more than model.max_new_tokens = 8 tokens",
        toml=SMALL_LM + "max_new_tokens = 8",
        data='generation = ["ward"]\ntarget_column = "label"',
        train=tuple((t, "rest and drink" * (9 if b == "a" else 2)) for t, b in ROWS),
        test=tuple((t, "rest and drink" * 9) for t, _ in TESTS),
        warns=True,
    ),
    OddInput(
        "a prompt that does not fit",
        "its prompt has ",
        toml=SMALL_LM + "[federation]\nrounds = 1",
        data='instructions.ward = "' + "Answer well. " * 4000 + '"',
    ),
    OddInput(
        "a prompt that does not fit beside the longest text",
        "lower train.max_length to ",
        toml=SMALL_LM + "max_new_tokens = 1\n[train]\nmax_length = 8190",
        warns=True,
    ),
    OddInput(
        "a learning rate out of any sense",
        "train.learning_rate = 0.5 is large for AdamW, and diverges",
        toml="[train]\nlearning_rate = 0.5",
        warns=True,
    ),
    OddInput(
        "a learning rate of AdamW where the server takes the steps",
        "train.learning_rate = 0.002 is of AdamW; the server takes plain steps",
        toml='[train]\nstep = "server"\n[aggregation]\nsecure = true\n[federation]\nclients = 3\n'
        '[adapter]\nkind = "pooled"',
        warns=True,
    ),
    OddInput(
        "a delta that is large for the number of records",
        "privacy.target_delta = 0.01 is too large for",
        toml='[privacy]\nmechanism = "record"\ntarget_delta = 0.01',
    ),
    OddInput(
        "an epsilon that promises nothing",
        "privacy.target_epsilon = 100 is above 20",
        toml='[privacy]\nmechanism = "record"\ntarget_epsilon = 100.0',
        warns=True,
    ),
    OddInput(
        "a column of patients beside records that are protected",
        "if that is who the column names, set privacy.unit_column = 'patient_id'",
        toml='[privacy]\nmechanism = "record"',
        files={
            TRAIN: "text,label,patient_id\n"
            + "".join(f"{t},{b},{n // 4}\n" for n, (t, b) in enumerate(ROWS))
        },
        warns=True,
    ),
)
