"""What ``flwr run`` uploads to the server and to every site: ten lines, and none of the project."""

from __future__ import annotations

import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from simulations.deployment.keys import make_key_pair
from simulations.deployment.programs import FlowerHome
from simulations.deployment.site.clientapp import digest_of, own_app, own_digest
from simulations.engines.flower import BUNDLE, program

MOST_LINES = 50


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_is_a_module_and_its_settings() -> None:
    with zipfile.ZipFile(io.BytesIO(own_app())) as bundle:
        held = {name: bundle.read(name).decode() for name in bundle.namelist()}
    assert set(held) == {"deal_app.py", "pyproject.toml", ".info/CONTENT"}
    assert sum(text.count("\n") for text in held.values()) <= MOST_LINES


def test_what_flower_builds_and_what_is_allowed_are_the_same_bytes(tmp_path: Path) -> None:
    """Also with keys and data lying about beside it; that ``flwr run`` sends this is seen in a real
    run."""
    copy = tmp_path / "app"
    shutil.copytree(BUNDLE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for place in ("site.key", "client/site.key", "client/data/train.jsonl", "client/app.py"):
        (copy / place).parent.mkdir(parents=True, exist_ok=True)
        (copy / place).write_bytes(make_key_pair("north").private)
    home = FlowerHome(tmp_path / "flower")
    home.make()
    command = [program("flwr"), "build", "--app", str(copy)]
    subprocess.run(command, cwd=home.empty, env=home.environment(), check=True, timeout=120)
    (built,) = (path.read_bytes() for path in home.empty.glob("*.fab"))
    assert digest_of(built) == own_digest()
