"""Dockerfiles and compose.yaml: what they name exists, and their steps work as processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from simulations import cli
from simulations.deployment.server.status import state_of
from simulations.engines.flower import members, stop_all
from tests.simulations.deployment.loopback import DEAL, ROOT, SLOW, free_port, wait_for

FOLDER = ROOT / "simulations/deployment/containers"
MARK = "DEAL_TEST_COMPOSE"


def instructions() -> list[tuple[str, str]]:
    """Keyword and the rest of every instruction, lines that go on joined."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


def services() -> dict[str, dict[str, Any]]:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


def require_command(words: list[str]) -> None:
    """``deal`` takes these words; nothing is run."""
    command = cli.command()
    while isinstance(command, click.Group):
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context("deal", list(words), resilient_parsing=False)


def test_the_image_copies_what_is_there_and_runs_as_a_user() -> None:
    found = instructions()
    for keyword, rest in found:
        if keyword == "COPY":
            sources = [name for name in rest.split()[:-1] if "$" not in name]
            assert all((ROOT / name).exists() for name in sources), rest
    base = dict(found)["FROM"]
    assert re.fullmatch(r"python:3\.11-\S+", base)  # requirements.lock is for Python 3.11
    assert [rest for keyword, rest in found if keyword == "USER"] == ["1000:1000"]
    keywords = [keyword for keyword, _ in found]
    assert keywords.index("USER") > max(n for n, k in enumerate(keywords) if k in ("RUN", "COPY"))
    assert dict(found)["ENTRYPOINT"] == '["deal"]'


def test_everything_in_the_image_comes_by_its_hash() -> None:
    steps = " && ".join(rest for keyword, rest in instructions() if keyword == "RUN")
    installs = [step for step in steps.split("&&") if "pip install" in step]
    assert len(installs) == 3
    hashed, assets, own = installs
    assert "--require-hashes" in hashed
    assert "--require-hashes" in assets
    assert {"--no-deps", "--no-build-isolation"} <= set(own.split())
    assert "--no-deps" in assets


def test_nothing_is_open_to_other_machines() -> None:
    for name, service in services().items():
        assert "ports" not in service
        mode = service.get("network_mode", "")
        expected = {"files": "none", "server": ""}.get(name, "service:server")
        assert mode == expected, name


def test_every_step_is_a_command_and_waits_for_one_that_exists() -> None:
    found = services()
    for name, service in found.items():
        build = service["build"]
        assert (FOLDER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert set(service.get("depends_on", {})) <= set(found), name
        for words in steps_of(service):
            assert words[0] == "deal"
            require_command(words[1:])


def steps_of(service: dict[str, Any]) -> list[list[str]]:
    """The commands of a service, in order."""
    if "entrypoint" not in service:
        return [["deal", *service["command"]]]
    assert service["entrypoint"] == ["sh", "-ec"]
    return [shlex.split(line) for line in service["command"][0].splitlines()]


def in_order() -> list[str]:
    """Services, each after those that it waits for; those that are only asked for left out."""
    left = {n: set(s.get("depends_on", {})) for n, s in services().items() if "profiles" not in s}
    ordered: list[str] = []
    while left:
        ready = [name for name, needs in left.items() if needs <= set(ordered)]
        assert ready, left
        ordered += ready
        left = {name: needs for name, needs in left.items() if name not in ready}
    return ordered


@pytest.mark.slow
@pytest.mark.timeout(1200 * SLOW)
def test_the_steps_of_the_compose_file_end_in_a_finished_run(tmp_path: Path) -> None:
    """As processes of this machine, in the file's order; ``/deal`` is a folder."""
    port, found = free_port(), services()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: str(tmp_path)}

    def words_of(words: list[str]) -> list[str]:
        own = [word.replace("/deal", str(tmp_path), 1) for word in words[1:]]
        extra = ["--superlink-port", str(port)] if own[:2] == ["demo", "files"] else []
        return [*DEAL, *own, *extra]

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    started: list[subprocess.Popen[bytes]] = []
    try:
        for name in in_order():
            for words in steps_of(found[name]):
                if words[2] == "start":
                    with (tmp_path / f"{name}.out").open("wb") as output:
                        process = subprocess.Popen(
                            words_of(words), env=environment, stdout=output, stderr=output
                        )
                    started.append(process)
                else:
                    subprocess.run(words_of(words), env=environment, check=True, timeout=300 * SLOW)
            if name == "server":
                wait_for("the server", answers, 90)
        (run,) = (tmp_path / "server/runs").iterdir()
        wait_for("the end of the run", lambda: state_of(run).phase == "finished", 600)
        status = words_of(steps_of(found["status"])[0])
        told = subprocess.run(
            status, env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        assert "finished" in told.stdout
    finally:
        stop_all(tmp_path, MARK)
        for process in started:
            process.wait()
    assert members(tmp_path, MARK) == []


@pytest.mark.slow
@pytest.mark.timeout(900 * SLOW)
def test_the_last_steps_of_an_image_work_in_a_clean_environment(tmp_path: Path) -> None:
    """The lock has CUDA's libraries, several GB: the dependencies are those of this
    environment; the copies, the install of the project and its command are the image's own."""
    app, home = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    for keyword, rest in instructions():
        if keyword == "COPY" and "$" not in rest:
            *names, target = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / name, app / Path(target).name, ignore=ignored)
                else:
                    shutil.copy(ROOT / name, app)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin/python"
    lock = (ROOT / "requirements.lock").read_text()
    names = "hatchling|editables|packaging|pathspec|pluggy|tomlkit|trove-classifiers"
    build = re.findall(rf"^(?:{names})==.*\n(?:    --hash.*\n)+", lock, flags=re.MULTILINE)
    (tmp_path / "build.lock").write_text("".join(build))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    subprocess.run([*pip, "--require-hashes", "-r", str(tmp_path / "build.lock")], check=True)
    own = [*pip, "--no-deps", "--no-build-isolation", "--editable", "."]
    subprocess.run(own, cwd=app, check=True)
    (site,) = [p for p in map(Path, sys.path) if p.name == "site-packages"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    said = subprocess.run(
        [str(home / "bin/deal"), "demo", "files", str(tmp_path / "deal")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "deal/server/server.toml").is_file()
