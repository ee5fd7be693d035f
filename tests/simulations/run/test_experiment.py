import json
from pathlib import Path

import pytest

from deal_core.config.file import parse_experiment, read_toml
from deal_core.errors import UserError
from server.folder import RunFolder
from simulations.run.experiment import Request, load_experiment
from simulations.run.simulate import (
    RECORD,
    check_folder,
    check_rows_same,
    claimed,
    record,
    rows_of,
    write_row_hashes,
)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def started(request):
    """A run folder as it is after the first checkpoint."""
    experiment = load_experiment(request)
    record(experiment)
    RunFolder(Path(experiment.run.out)).checkpoint.touch()
    return experiment


def test_the_run_folder_is_named_after_experiment_and_seed_and_is_absolute(tmp_path):
    assert load_experiment(Request("quickstart")).run.out == str(tmp_path / "runs/quickstart-seed0")
    seeded = load_experiment(Request("quickstart", seed=3))
    assert (seeded.run.seed, Path(seeded.run.out).name) == (3, "quickstart-seed3")
    by_set = load_experiment(Request("quickstart", overrides=("run.seed=4",)))
    assert Path(by_set.run.out).name == "quickstart-seed4"
    assert load_experiment(Request("quickstart", out="x")).run.out == str(tmp_path / "x")


def test_arguments_beat_overrides_beat_the_file(tmp_path):
    Path("own.toml").write_text("[adapter]\nrank = 4\n[run]\nseed = 1\nengine = 'flower'\n")
    experiment = load_experiment(
        Request("own.toml", overrides=("adapter.rank=5", "run.seed=2"), seed=3, engine="inprocess")
    )
    assert experiment.adapter.rank == 5
    assert (experiment.run.seed, experiment.run.engine) == (3, "inprocess")


def test_paths_become_absolute_because_apps_run_elsewhere(tmp_path):
    (tmp_path / "model").mkdir()
    overrides = ("data.source=files", "data.path=../data", "model.name=model")
    experiment = load_experiment(Request("quickstart", overrides=overrides))
    assert experiment.data.path == str(tmp_path.parent / "data")
    assert experiment.model.name == str(tmp_path / "model")
    assert load_experiment(Request("quickstart")).model.name == "embedded:minilm"
    (tmp_path / "exp" / "mine").mkdir(parents=True)
    file = tmp_path / "exp" / "own.toml"  # what is beside it is found
    file.write_text('data.source = "hub"\ndata.hub = {a = {path = "mine"}, b = {path = "o/n"}}\n')
    hub = load_experiment(Request(str(file))).data.hub
    assert (hub["a"].path, hub["b"].path) == (str(tmp_path / "exp" / "mine"), "o/n")


def test_a_fault_in_the_file_is_blamed_on_the_file_and_one_in_set_on_set():
    Path("own.toml").write_text("[adapter]\nrnk = 4\n")
    with pytest.raises(UserError, match=r"own.toml: unknown key 'adapter.rnk'.*'rank'"):
        load_experiment(Request("own.toml", overrides=("run.seed=1",)))
    with pytest.raises(UserError, match=r"^--set: key 'adapter.rank'"):
        load_experiment(Request("quickstart", overrides=("adapter.rank=x",)))


def test_the_record_reads_back_as_the_experiment():
    request = Request(
        "clinc10", overrides=('data.hub={"a b" = {path = "x", text_column = "é\\"☃"}}',)
    )
    experiment = started(request)
    path = Path(experiment.run.out) / RECORD
    assert parse_experiment(read_toml(path), "record") == experiment


def test_a_start_that_came_to_no_checkpoint_does_not_block_the_next():
    experiment = load_experiment(Request("quickstart"))
    record(experiment)
    folder = RunFolder(Path(experiment.run.out))
    folder.metrics.write_text('{"event": "run_stopped"}\n')
    check_folder(experiment)
    record(experiment)
    assert not folder.metrics.exists()


def test_resume_with_other_settings_names_the_first_that_differs():
    started(Request("quickstart"))
    with pytest.raises(UserError, match=r"quickstart-seed0: already holds a run"):
        check_folder(load_experiment(Request("quickstart")))
    other = Request("quickstart", overrides=("adapter.rank=4", "train.batch_size=2"), resume=True)
    with pytest.raises(UserError, match=r"'adapter.rank' is 4, but .* started with 8"):
        check_folder(load_experiment(other))


def test_resume_may_change_what_changes_no_result_and_keeps_the_record():
    """Engine, threads, and settings of a method that the run does not have: another default of a
    baseline leaves all other runs that have begun as they are."""
    first = started(Request("quickstart"))
    other = ("method.prototype.layers=2",)  # deal reads it
    with pytest.raises(UserError, match=r"'method.prototype.layers' is 2"):
        check_folder(load_experiment(Request("quickstart", overrides=other, resume=True)))
    text = (Path(first.run.out) / RECORD).read_text()
    harmless = ("run.threads=1", "method.ewc.weight=7")
    again = Request("quickstart", overrides=harmless, engine="flower", resume=True)
    experiment = load_experiment(again)
    check_folder(experiment)
    record(experiment)
    assert (Path(first.run.out) / RECORD).read_text() == text


def test_other_rows_than_those_of_the_run_are_refused(tmp_path):
    experiment = load_experiment(Request("quickstart", out=str(tmp_path / "run")))
    write_row_hashes(experiment)
    path = RunFolder(tmp_path / "run").row_hashes
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surgery": "another"}))
    told = r"--labels: the rows of task 'surgery' .*; put the old files back, or leave it out$"
    with pytest.raises(UserError, match=told):
        check_rows_same(experiment, tmp_path / "run", "--labels", "leave it out")
    path.write_text("[")
    with pytest.raises(UserError, match=r"rows.json: no record .* remove it to go on"):
        check_rows_same(experiment, tmp_path / "run", "--labels", "leave it out")


ROWS = "text,label\n" + "".join(f"word {n} of ward,{'ab'[n % 2]}\n" for n in range(24))


def write_rows(task, train, test):
    for split, rows in {"train": train, "test": test}.items():
        path = Path("data") / task / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows)


OTHER, LABEL = ROWS.replace("word", "sign"), ROWS.replace(",a\n", ",A\n")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        *(
            (("ward", *rows), "the rows of task 'ward' are not those that")
            for rows in ((ROWS, OTHER), (OTHER, ROWS), (LABEL, LABEL))
        ),
        (("bed", ROWS, ROWS), r"has the tasks bed, ward, .* was started with ward;"),
    ],
)
def test_a_run_goes_on_with_the_rows_that_it_was_started_with(make_experiment, change, line):
    write_rows("ward", ROWS, ROWS)
    own = ("data.source=files", "data.tasks=[]", "data.path=data", "run.out=run")
    start, again = make_experiment(*own), make_experiment(*own, "run.resume=true")
    folder = RunFolder(Path("run"))
    with claimed(start):
        folder.checkpoint.write_bytes(b"")
    assert list(rows_of([folder.path])) == ["ward"]
    with claimed(again):
        pass
    write_rows(*change)
    with pytest.raises(UserError, match=line) as refused, claimed(again):
        pass
    assert "or start in another --out" in str(refused.value)
    folder.checkpoint.replace(folder.previous)
    check_folder(again)
    folder.previous.unlink()
    with pytest.raises(UserError, match="holds no checkpoint to resume"):
        check_folder(again)
