import pytest

from deal_core.config.file import read_toml
from deal_core.errors import UserError
from simulations.output import descriptions, shipped_experiments, shipped_studies
from simulations.study.grid import chosen, grid, load_study

STUDY = """
description = "test"
seeds = [3, 1]
[set]
adapter.rank = 4
train.batch_size = 2
[arms.one]
set.method.name = "sequential"
[arms.two]
set.adapter.rank = 5
seeds = [1, 7]
[arms.all-at-once]
bound = "joint"
[orders.forth]
tasks = ["laboratory", "surgery"]
[orders.back]
tasks = ["surgery", "laboratory"]
[settings.small]
data.max_train = 50
adapter.rank = 3
"""


def study(tmp_path, text=STUDY):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_study(str(path))


def cells(tmp_path, text=STUDY, *overrides):
    return grid(study(tmp_path, text), tmp_path / "out", overrides)


def test_cells_come_seed_after_seed_in_the_order_of_the_file(tmp_path):
    assert [cell.name for cell in cells(tmp_path)] == [
        "one.forth.small.seed3",
        "all-at-once.forth.small.seed3",  # a bound that knows no order runs in the first alone
        "one.back.small.seed3",
        "one.forth.small.seed1",
        "two.forth.small.seed1",
        "all-at-once.forth.small.seed1",
        "one.back.small.seed1",
        "two.back.small.seed1",
        "two.forth.small.seed7",
        "two.back.small.seed7",
    ]


def test_the_later_table_holds_and_set_over_all(tmp_path):
    by_name = {cell.name: cell.runs[""] for cell in cells(tmp_path)}
    one, two = by_name["one.back.small.seed1"], by_name["two.back.small.seed1"]
    assert (one.adapter.rank, two.adapter.rank) == (3, 5)  # [set] < setting < arm
    assert one.data.tasks == ("surgery", "laboratory")
    assert one.federation.clients == 4  # the quickstart's
    assert (one.run.seed, one.run.threads, one.run.workers) == (1, 1, 1)
    assert one.run.out == str(tmp_path / "out/cells/one.back.small.seed1")
    forced = cells(tmp_path, STUDY, "adapter.rank=9", "run.threads=2")
    assert {cell.runs[""].adapter.rank for cell in forced} == {9}
    assert {cell.runs[""].run.threads for cell in forced} == {2}


def test_bounds_are_ordinary_experiments(tmp_path):
    text = """
    [set]
    data.tasks = ["laboratory", "surgery"]
    federation.clients = 3
    [arms]
    joint.bound = "joint"
    tasks.bound = "per-task"
    sites.bound = "local-only"
    """
    found = [cell.runs for cell in cells(tmp_path, text)]
    assert {run.method.name for runs in found for run in runs.values()} == {"sequential"}
    joint, tasks, sites = found
    assert joint[""].stream.schedule == "joint"
    own = {"laboratory": ("laboratory",), "surgery": ("surgery",)}
    assert {name: run.data.tasks for name, run in tasks.items()} == own
    assert [run.federation.participants for run in sites.values()] == [(0,), (1,), (2,)]
    assert len({run.run.out for runs in found for run in runs.values()}) == 6


def test_a_part_of_the_grid_is_named_by_parts_of_names_or_patterns(tmp_path):
    whole = cells(tmp_path)
    assert chosen(whole, []) == whole
    assert [c.name for c in chosen(whole, ["two.*.seed1"])] == [
        "two.forth.small.seed1",
        "two.back.small.seed1",
    ]
    assert {c.seed for c in chosen(whole, ["seed7", "seed3"])} == {3, 7}
    with pytest.raises(UserError, match=r"--only tow: no cell has such a name; there are one\."):
        chosen(whole, ["two", "tow"])


def test_an_experiment_is_a_study_of_one_arm_under_budgets(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("[adapter]\nrank = 7\n")
    study = load_study(str(path), seeds=(4, 5), budgets="0.5,8,inf")
    found = grid(study, tmp_path / "out")
    assert [cell.name for cell in found if cell.seed == 4] == [
        "own.eps-0_5.seed4",
        "own.eps-8.seed4",
        "own.eps-inf.seed4",
    ]
    settings = [cell.runs[""].privacy for cell in found[:3]]
    assert [each.mechanism for each in settings] == ["record", "record", "none"]
    assert settings[0].target_epsilon == 0.5
    assert {cell.runs[""].adapter.rank for cell in found} == {7}
    for text in ("0", "-1", "x", "1,1", "2000", "nan"):
        with pytest.raises(UserError, match=f"--epsilon {text}: "):
            load_study(str(path), budgets=text)
    own = tmp_path / "mine.toml"
    own.write_text("experiment = 'own.toml'\n[arms.a]\n")  # it lies beside the study
    (cell,) = grid(load_study(str(own)), tmp_path / "out")
    assert cell.runs[""].adapter.rank == 7
    path.write_text("[arms.one]\n[settings.a]\nadapter.rank = 3\n")
    with pytest.raises(UserError, match="has settings, and budgets beside them"):
        load_study(str(path), budgets="8")


@pytest.mark.parametrize(
    "override", ['mechanism="record"', 'mechanism="none"', "target_epsilon=4.0"]
)
def test_nothing_overrules_a_budget_nor_its_absence(tmp_path, override):
    """Else what is called without privacy is trained privately, or all budgets at one epsilon."""
    text = 'epsilons = "2,inf"\n[arms.a]\n'
    for own, overrides in ((f"set.privacy.{override}\n", []), ("", [f"privacy.{override}"])):
        with pytest.raises(UserError, match="budgets are those of --epsilon"):
            cells(tmp_path, text + own, *overrides)
    kept = cells(tmp_path, text, "privacy.target_delta=1e-3")
    assert [cell.runs[""].privacy.mechanism for cell in kept] == ["record", "none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[arm.a]\n", r"mine.toml: unknown key 'arm'; did you mean 'arms'\?"),
        ("[arms.a]\nset.adapter.rnk = 4\n", r"mine.toml: \[arms.a.set\]: .*'adapter.rnk'.*'rank'"),
        ("[arms.a]\n[settings.s]\nrun.seed = -1\n", r"mine.toml: \[settings.s\]: key 'run.seed'"),
        ("seeds = [1, 1]\n[arms.a]\n", r"seeds \[1, 1\]: name one at least, all different"),
        ("[arms]\n", "has no arm"),
        ('[arms."a.b"]\n', r"\[arms.\"a.b\"\]: a name is letters"),
        ("[arms.a]\nbound = 'jiont'\n", "unknown bound 'jiont'; known: joint, joint-all-labels"),
        ("candidate = 'b'\n[arms.a]\n", "unknown arm 'b'"),
        ("baseline = 'a'\n[arms.a]\nbound = 'joint'\n", "'a' is a bound or a reference"),
        ("experiment = 'own.toml'\n[arms.a]\n", "own.toml: no such file"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        cells(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", shipped_studies())
def test_every_shipped_study_is_a_grid_of_valid_experiments(tmp_path, name):
    study = load_study(name)
    assert descriptions(shipped_studies())[name] == study.file.description != ""
    assert f"deal study {name}" in study.path.read_text().splitlines()[0]
    ordered = {task for order in study.file.orders.values() for task in order.tasks}
    clinc = read_toml(shipped_experiments()["clinc10"])["data"]["tasks"]
    for task in {*study.file.set.get("data", {}).get("tasks", ()), *ordered, *clinc}:
        (tmp_path / task).mkdir()
    found = grid(study, tmp_path / "out", (f"data.path={tmp_path}",))
    assert len({cell.name for cell in found}) == len(found)
    folders = [run.run.out for cell in found for run in cell.runs.values()]
    assert len(set(folders)) == len(folders)
