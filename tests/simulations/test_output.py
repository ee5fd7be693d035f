"""Pages and tables on a terminal: nothing wider than promised, nothing cut off."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from server.folder import RunFolder, read_events
from simulations.cli import app
from simulations.output import FIGURES, Table, at_work, print_table
from simulations.run.experiment import Request
from simulations.run.simulate import simulate
from tests.conftest import SHORT
from tests.sizes import TINY


def test_names_in_a_table_are_no_markup():
    console = Console(file=io.StringIO(), width=200)
    print_table(console, Table("of [blue]", ("setting", "[red]run"), (("[bold]key", "1"),)))
    said = console.file.getvalue()
    assert all(name in said for name in ("[red]run", "[bold]key", "of [blue]"))


@pytest.mark.parametrize(("words", "own"), [("study tuning", "study.json"), ("audit private", "")])
def test_figures_of_another_kind_are_left_alone(words, own, tmp_path):
    file = "results.json" if own else "study.json"
    (tmp_path / file).write_text("{}")
    result = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path)])
    assert str(result.exception) == f"{tmp_path}: holds {FIGURES[file]}; name another --out"
    assert [each.name for each in tmp_path.iterdir()] == [file]


def test_what_takes_its_time_is_said_before_it_begins_and_then_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("simulations.output.LONGEST_SILENCE", 0.0)
    log, said = RunFolder(tmp_path / "run").metrics, list[tuple[str, set[str]]]()
    plugin, read = tmp_path / "plugin.py", tmp_path / "read"
    plugin.write_text(f"open({str(read)!r}, 'w').close()")

    def seen(line):
        events = [f"{e['event']} {e.get('stage')}" for e in read_events(log)]
        said.append((line, {*events, *(["plugin"] if read.exists() else [])}))

    monkeypatch.setattr("simulations.output.print_line", lambda console, line: seen(line))
    keys = (*SHORT, *TINY, 'data.tasks=["surgery"]', f'plugins=["{plugin}"]')
    request = Request("quickstart", str(tmp_path / "run"), keys)
    assert simulate(request, Console(file=io.StringIO())) == 0
    for phase, later in {
        "reading the experiment": "plugin",
        "reading the data": "run_started None",
        "building the model": "run_started None",
        "zero-shot evaluation": "evaluated -1",
        "training": "client_finished 0",
        "1/1 surgery: evaluation": "evaluated 0",
    }.items():
        line, before = next(each for each in said if phase in each[0])
        assert later not in before, line
    for phase in ("zero-shot evaluation", "training", ": evaluation"):
        assert any(phase in line and "1 of 2 clients" in line for line, _ in said)


def test_a_terminal_shows_a_spinner_and_a_pipe_one_line_for_what_is_new(capsys):
    shown, terminal = io.StringIO(), {"force_terminal": True, "force_interactive": True}
    for console in (Console(file=shown, **terminal), Console(file=io.StringIO())):
        with at_work(console, "reading") as say:
            for place in range(3):
                say("answering [1]", f"{place} of 3")
    assert capsys.readouterr().err.splitlines() == ["reading", "answering [1], 0 of 3"]
    assert "answering [1], 2 of 3" in shown.getvalue()
