"""Every command that the server's side prints works when it is pasted, from any folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deal_core.errors import UserError
from server.folder import RunFolder, exclusive_lock
from simulations.deployment.keys import make_key_pair
from simulations.deployment.server import submit as submitting
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    add_site,
    init_server,
    remove_site,
    starting_lines,
)
from simulations.deployment.server.status import RunState, next_step, status
from simulations.deployment.server.submit import (
    resume,
    run_folder,
    stop,
    submit,
)
from tests.simulations.deployment.short_experiment import experiment_file

OF_A_FOLDER = r"deal (?:submit|status|stop|server (?:add-site|remove-site))\b"
"""Commands that look for the server in the folder that they are called from, but for ``--dir``."""


def answer(*words: str) -> dict[str, object]:
    """Flower's, to everything that these commands ask."""
    return {"node-id": 1, "run-id": 7, "runs": [{"status": "running"}], "nodes": []}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerFolder:
    folder = ServerFolder(tmp_path / "the server")
    init_server(folder, ServerSettings(hosts=("localhost",)))
    folder.flower = SimpleNamespace(ask=answer)
    return folder


def key(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.pub"
    path.write_bytes(make_key_pair(name).public)
    return path


def error(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def require_pasteable(said: str, folder: ServerFolder) -> None:
    where = f" --dir {shlex.quote(str(folder.path))}"
    found = list(re.finditer(OF_A_FOLDER, said))
    assert found, said
    for each in found:
        rest = re.split(r"deal |; |\n", said[each.end() :])[0]
        assert where in rest, said[each.start() :]


def test_a_folder_with_a_space_is_one_word() -> None:
    folder = ServerFolder("/srv/the server")
    assert shlex.split(folder.command("stop one"))[-2:] == ["--dir", "/srv/the server"]


def test_what_is_printed_before_a_run_names_the_folder(server, tmp_path, capsys) -> None:
    require_pasteable("\n".join(starting_lines(server)), server)
    require_pasteable(error(lambda: run_folder(server, "")), server)
    require_pasteable(error(lambda: submit(server, "quickstart")), server)
    to_south = ('federation.sites=["south"]', "federation.clients=1")
    require_pasteable(error(lambda: submit(server, "quickstart", to_south)), server)
    require_pasteable("\n".join(add_site(server, "north", key(tmp_path, "north"))), server)
    again = error(lambda: add_site(server, "north", key(tmp_path, "other")))
    require_pasteable(again, server)
    status(server, "", Console(width=200), as_json=False)
    require_pasteable(capsys.readouterr().out, server)
    require_pasteable("\n".join(remove_site(server, "north")), server)


def test_what_is_printed_of_a_run_names_the_folder(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(submitting, "BUNDLE", tmp_path)
    add_site(server, "north", key(tmp_path, "north"))
    said = submit(server, str(experiment_file(tmp_path / "two-tasks.toml")))
    require_pasteable("\n".join(said), server)
    assert "deal stop " in "\n".join(said)
    run = run_folder(server, "")
    for phase in ("running", "stopped"):
        require_pasteable(next_step(server, run.name, RunState(phase=phase)), server)
    with exclusive_lock(RunFolder(run).launching):
        require_pasteable(error(lambda: resume(server, run.name)), server)
    require_pasteable("\n".join(stop(server, run.name)), server)


def test_the_port_that_listens_without_a_proxy_is_named(tmp_path, monkeypatch) -> None:
    folder = ServerFolder(tmp_path / "server")
    settings = ServerSettings(hosts=("here.example.org",), port=9443, superlink_port=9555)
    made = "\n".join(init_server(folder, settings))
    folder.flower = SimpleNamespace(ask=answer)
    started = "\n".join(starting_lines(folder))
    added = "\n".join(add_site(folder, "north", key(tmp_path, "north")))
    for said in (made, started, added):
        assert "localhost:9555" in said
        assert "here.example.org:9443" in said
        assert "without a proxy" in said
