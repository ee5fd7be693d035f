"""A method from one's own file: in every worker, and its faults in one line."""

import sys

import pytest
from flwr.app import Context, RecordDict

from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.errors import UserError
from deal_core.methods import METHODS
from server.results import read_results
from simulations import cli
from simulations.engines import load_plugins
from simulations.engines.worker_pool import answer
from simulations.run.model_checks import check_method
from simulations.run.quick_checks import check_engine
from tests.sizes import QUIET, TINY

PLUGIN = """
from deal_core.baselines.sequential import Sequential
from deal_core.methods import METHODS


class Mine(Sequential):
    def objective(self, task):
        {line}
        return super().objective(task)


METHODS["{name}"] = lambda method, adapter: Mine(adapter)
"""


def simulated(folder, name, line, monkeypatch, workers):
    """The exit code of the command on an experiment with such a plugin."""
    (folder / f"{name}.py").write_text(PLUGIN.format(name=name, line=line))
    (folder / "mine.toml").write_text(f'plugins = ["{name}.py"]\nmethod.name = "{name}"\n')
    small = (*TINY, *QUIET, 'data.tasks=["surgery"]', "federation.rounds=1", "run.threads=1")
    words = [w for each in (*small, f"run.workers={workers}") for w in ("--set", each)]
    arguments = ["simulate", str(folder / "mine.toml"), "--out", str(folder / "run"), *words]
    monkeypatch.setattr(sys, "argv", ["deal", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    METHODS.pop(name)
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_a_method_of_ones_own_file_runs_in_every_worker(tmp_path, monkeypatch):
    assert simulated(tmp_path, "mine_works", "pass", monkeypatch, workers=2) == 0
    results = read_results(tmp_path / "run")
    assert results.config.method.name == "mine_works"
    assert results.wire.bytes_up[0] > 0


def test_a_worker_reads_the_plugins_of_its_run_before_it_answers(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PLUGIN.format(name="mine_read", line="pass"))
    config = to_run_config(Experiment(plugins=(str(tmp_path / "mine.py"),)))
    monkeypatch.setattr("client.app.app", lambda *asked: METHODS.pop("mine_read"))
    assert answer(None, Context(1, 1, {}, RecordDict(), config)) is not None


def test_a_fault_at_a_client_is_one_line_with_its_place(tmp_path, monkeypatch, capfd, caplog):
    assert simulated(tmp_path, "mine_fails", "1 / 0", monkeypatch, workers=1) == 2
    told = [each for each in caplog.records if "mine_fails.py" in each.getMessage()]
    assert [each.getMessage() for each in told] == [
        f"{tmp_path / 'mine_fails.py'}:8: ZeroDivisionError: division by zero"
    ]
    assert "Traceback" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\nimport nothing_of_that_name\n", "plugin.py:2: ModuleNotFoundError: No module"),
        ("def f(:\n", "plugin.py:1: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, text, told):
    (tmp_path / "plugin.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_plugins([str(tmp_path / "plugin.py")])
    assert str(caught.value).startswith(f"{tmp_path}/{told}")
    with pytest.raises(UserError, match="no such file"):
        load_plugins([str(tmp_path / "none.py")])


def test_no_site_and_no_other_engine_reads_a_plugin():
    named = Experiment(plugins=("mine.py",))
    at_sites = named.model_copy(update={"data": named.data.model_copy(update={"source": "sites"})})
    with pytest.raises(UserError, match="a site runs what is installed there"):
        check_method(at_sites)
    flower = named.model_copy(update={"run": named.run.model_copy(update={"engine": "flower"})})
    with pytest.raises(UserError, match="inprocess"):
        check_engine(flower)
