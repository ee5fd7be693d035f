"""Whose a row is: read from a column of any source, kept together, and asked about where a column
looks as if it said so."""

import json
from collections import Counter

import pytest

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import Example, TaskData, load_for_clients, open_source
from deal_core.data.files import looks_like_identifier, repeated_identifiers
from deal_core.data.partition import partition
from deal_core.data.rows import folded
from deal_core.data.source import each_by_itself
from deal_core.errors import UserError

ROWS = [
    {"text": f"case {n}", "label": "ab"[n % 2], "patient": n // 3, "ward": f"w{n % 2}"}
    for n in range(12)
]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    for task in ("triage", "referral"):
        jsonl(tmp_path / task / "train.jsonl", ROWS)
        jsonl(tmp_path / task / "test.jsonl", ROWS[:3])
    return tmp_path


def files(folder, **keys):
    return DataConfig(source="files", path=str(folder), **keys)


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        (7, "7"),
        (7.0, "7"),
        (7.5, "7.5"),
        ("7.0", "7"),
        ("v7.0", "v7.0"),
        (-7.0, "-7"),
        (1e16, "10000000000000000"),
        ("007", "7"),
        ("0070.0", "70"),
        ("M\u00fcller", "m\u00fcller"),
        ("Mu\u0308ller", "m\u00fcller"),
        ("\u00a0MÜLLER \u2003 Ada\u200b", "m\u00fcller ada"),
        ("\uff30\uff11", "p1"),
        ("Stra\u00dfe", "strasse"),
    ],
)
def test_a_number_is_one_persons_however_it_was_written(folder, value, unit):
    """Writers turn whole numbers into floats where a value is missing elsewhere, and spell a letter
    in two ways; and one record's, or it would not be found in two tasks."""
    jsonl(folder / "triage" / "train.jsonl", [{**ROWS[0], "patient": value}])
    jsonl(folder / "triage" / "test.jsonl", [ROWS[0]])
    row = open_source(files(folder, id_column="patient"), "patient").load("triage").train[0]
    assert (row.unit, row.id) == (unit, unit)


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_row_that_is_nobodys_is_one_clear_line(folder, value):
    jsonl(folder / "triage" / "train.jsonl", [*ROWS, {**ROWS[0], "patient": value}])
    with pytest.raises(UserError, match=r"train.jsonl, row 13: column 'patient' is empty") as error:
        open_source(files(folder), "patient").load("triage")
    assert "\n" not in str(error.value)


def test_a_site_leaves_out_rows_that_are_nobodys_and_counts_them(folder):
    """One row must not decide how a request ends."""
    jsonl(folder / "triage" / "train.jsonl", [*ROWS, {**ROWS[0], "patient": None}])
    config = DataConfig(source="site", path=str(folder), labels={"triage": ("a", "b")})
    task = open_source(config, "patient").load("triage")
    assert (len(task.train), task.left_out) == (12, 1)
    assert {e.unit for e in task.train} == {"0", "1", "2", "3"}
    assert open_source(config, "nobody").load("triage").train == ()


def task_of(units, name="task", tests=None):
    """Records of these units, with three labels."""
    labels = ("a", "b", "c")

    def examples(split, owners):
        return tuple(
            Example(f"{split} {i}", labels[(i + unit) % 3], f"site {unit % 4}", unit=f"p{unit}")
            for i, unit in enumerate(owners)
        )

    return TaskData(name, labels, examples("train", units), examples("test", tests or units[::3]))


UNITS = [n for unit in range(60) for n in [unit] * (1 + unit % 5)]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_records_of_a_group_go_to_one_client(kind, seed):
    task = task_of(UNITS, tests=[*UNITS[::2], *range(60, 80)])
    config = PartitionConfig(kind=kind)
    parts = partition(task, config, 5, seed)
    for split in ("train", "test"):
        dealt = [example for part in parts for example in getattr(part, split)]
        assert Counter(dealt) == Counter(getattr(task, split))
    owners = {}
    for client, part in enumerate(parts):
        for example in (*part.train, *part.test):
            owners.setdefault(example.unit, set()).add(client)
    assert len(owners) == 80
    assert {len(clients) for clients in owners.values()} == {1}
    assert sum(bool(part.train) for part in parts) >= 4
    assert parts == partition(task, config, 5, seed)


def test_iid_gives_a_group_the_same_client_in_every_task():
    owners = {}
    sizes = []
    for name, units in (("one", UNITS), ("two", UNITS[::-1]), ("three", list(range(0, 60, 2)))):
        parts = partition(task_of(units, name), PartitionConfig(kind="iid"), 3, 0)
        sizes += [len({e.unit for e in part.train}) for part in parts]
        for client, part in enumerate(parts):
            for example in part.train:
                owners.setdefault(example.unit, set()).add(client)
    assert {len(clients) for clients in owners.values()} == {1}
    assert min(sizes) >= 4


def test_by_column_the_column_says_who_has_what():
    task = task_of(UNITS)
    parts = partition(task, PartitionConfig(kind="column", column="x"), 4, 0)
    assert [{e.group for e in part.train} for part in parts] == [{f"site {n}"} for n in range(4)]


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_share_takes_groups_whole_and_the_same_in_every_task(share):
    task = task_of([n for unit in range(400) for n in [unit] * 3])
    kept = each_by_itself(task.train, "one", share)
    units = Counter(e.unit for e in kept)
    assert set(units.values()) == {3}
    assert abs(len(units) / 400 - share) < 0.08
    assert each_by_itself(task.train, "two", share) == kept
    without = tuple(e for e in task.train if e.unit != "p7")
    assert each_by_itself(without, "one", share) == tuple(e for e in kept if e.unit != "p7")


def test_a_runs_clients_have_units(folder, make_experiment):
    experiment = make_experiment(
        "data.source=files",
        f'data.path="{folder}"',
        "data.tasks=[]",
        "data.max_train=6",
        "privacy.mechanism=record",
        "privacy.unit_column=patient",
    )
    found = load_for_clients(experiment, "triage")
    sizes = Counter(e.unit for e in found.train)
    assert 0 < len(sizes) < 4
    assert set(sizes.values()) == {3}


@pytest.mark.parametrize("name", ["patient_id", "PatientID", "patientid", "Subject", "MRN", "pid"])
def test_names_of_identifiers(name):
    assert looks_like_identifier(name)


def test_an_identifier_that_repeats_is_found_and_nothing_else(folder):
    found = list(repeated_identifiers(files(folder)))
    assert [said for _, said in found] == [
        f"column 'patient' of task '{task}' has 4 values in 12 training rows (one of them in 3)"
        for task in ("referral", "triage")
    ]
    one = files(folder, tasks=("triage",))
    assert not list(repeated_identifiers(one.model_copy(update={"label_column": "patient"})))
    assert not list(repeated_identifiers(DataConfig()))
    path = folder / "triage" / "train.jsonl"
    jsonl(path, [{**row, "patient": n} for n, row in enumerate(ROWS)])
    assert not list(repeated_identifiers(one))
    path.write_text("no table")
    assert not list(repeated_identifiers(one))


@pytest.mark.parametrize(
    "other", ["Cafe\u0301", "\ufeffCaf\u00e9\u200b", " CAF\u00c9_", "\uff23af\u00e9"]
)
def test_labels_that_look_alike_have_one_form(other):
    assert folded(other) == folded("Caf\u00e9")
    for one, two in (("1", "10"), ("1.5", "1"), ("a.0", "a"), ("01", "1"), ("no", "on")):
        assert folded(one) != folded(two)
    assert folded("-3.0") == folded("-3")
