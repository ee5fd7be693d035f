"""A run goes on with the rows that it was started with, from whatever checkpoint is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder
from simulations.run.run_folder import DataRecord, check_folder, claimed, data_record

ROWS = "text,label\n" + "".join(f"word {n} of ward,{'ab'[n % 2]}\n" for n in range(24))


@pytest.fixture
def start(
    tmp_path: Path, make_experiment: Callable[..., Experiment]
) -> Callable[[bool], Experiment]:
    for split in ("train", "test"):
        path = tmp_path / "data" / "ward" / f"{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROWS)

    def experiment(resume: bool) -> Experiment:
        return make_experiment(
            "data.source=files",
            "data.tasks=[]",
            f'data.path="{tmp_path / "data"}"',
            f'run.out="{tmp_path / "run"}"',
            f"run.resume={str(resume).lower()}",
        )

    return experiment


def begun(experiment: Experiment) -> RunFolder:
    folder = RunFolder(Path(experiment.run.out))
    with claimed(experiment):
        folder.checkpoint.write_bytes(b"")
    return folder


def test_the_same_rows_go_on(start: Callable[[bool], Experiment]) -> None:
    folder = begun(start(False))
    record = DataRecord.model_validate_json(folder.data_record.read_bytes())
    assert record == data_record(start(False))
    assert (record.tasks["ward"].train, record.tasks["ward"].test) == (16, 16)
    with claimed(start(True)):
        pass
    folder.data_record.unlink()  # as in a run of an earlier version
    with claimed(start(True)):
        pass


def test_a_task_more_or_fewer_does_not(start: Callable[[bool], Experiment], tmp_path: Path) -> None:
    folder, ward, other = begun(start(False)), tmp_path / "data" / "ward", tmp_path / "data" / "bed"
    shutil.copytree(ward, other)
    line = r"has the tasks bed, ward, .* was started with ward;"
    with pytest.raises(UserError, match=line), claimed(start(True)):
        pass
    folder.data_record.unlink()
    folder.checkpoint.unlink()
    begun(start(False))
    shutil.rmtree(other)
    line = r"has the tasks ward, .* was started with bed, ward;"
    with pytest.raises(UserError, match=line), claimed(start(True)):
        pass


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "changed",
    [ROWS.replace("word", "sign"), ROWS.replace(",a\n", ",A\n")],
)
def test_other_rows_do_not(
    start: Callable[[bool], Experiment], tmp_path: Path, split: str, changed: str
) -> None:
    begun(start(False))
    splits = ("train", "test") if "A" in changed else (split,)  # the labels of one are the other's
    for name in splits:
        (tmp_path / "data" / "ward" / f"{name}.csv").write_text(changed)
    rows = "the rows of task 'ward' are not those that"
    with pytest.raises(UserError, match=rows) as refused, claimed(start(True)):
        pass
    assert "\n" not in str(refused.value)
    assert "put the old files back, or start in another --out" in str(refused.value)


def test_a_damaged_record_is_one_line(start: Callable[[bool], Experiment]) -> None:
    begun(start(False)).data_record.write_text("[")
    damaged = r"data.json: no record of a run's rows .* remove it to go on"
    with pytest.raises(UserError, match=damaged), claimed(start(True)):
        pass


def test_with_neither_checkpoint_there_is_nothing_to_resume(
    start: Callable[[bool], Experiment],
) -> None:
    folder = begun(start(False))
    folder.checkpoint.replace(folder.previous)
    check_folder(start(True))
    folder.previous.unlink()
    with pytest.raises(UserError, match="holds no checkpoint to resume"):
        check_folder(start(True))
