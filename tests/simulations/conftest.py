"""Two short runs that pages are made of, and the command."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import experiment_with
from tests.sizes import TINY_MODEL

SETTINGS = {
    "plain": ("federation.clients=3",),
    "private": ("privacy.mechanism=record", "train.batch_size=4"),
}


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of each name; the first client of ``plain`` answers with NaN."""
    from simulations.run.simulate import record
    from tests.simulations.runs import at, no_number, run_in_process

    folder = tmp_path_factory.mktemp("examples")
    for name, settings in SETTINGS.items():
        experiment = at(experiment_with(*settings, *TINY_MODEL), folder / name)
        record(experiment)
        run_in_process(experiment, *([no_number] if name == "plain" else []))
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings are empty: they cost seconds, and the tables have their figures."""
    monkeypatch.setattr("simulations.report.blocks.draw", lambda height, paint, form: b"")


@pytest.fixture
def deal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call the entry point in an empty folder: exit code, stdout, stderr."""
    from simulations import cli

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deal", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def sums_of_all_records() -> Iterator[None]:
    """No record is held back, and class means are used whatever they are worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.runtime.HELD_BACK", 10**9)
        patch.setattr("server.strategy.found_worse", lambda *given: False)
        yield
