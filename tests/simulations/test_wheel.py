"""The wheel holds everything that the packages read beside their code."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deal_core.data.embedded import REQUIREMENTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # it asks a package index for hatchling
def test_the_wheel_is_complete(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assets = archive.read(f"federated_deal/{REQUIREMENTS}")
        archive.extractall(tmp_path / "installed")
    assert assets == (ROOT / REQUIREMENTS).read_bytes()
    kept = subprocess.run(
        ["git", "ls-files", "client", "server", "deal_core", "simulations"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert set(kept) - names == set()
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    code = "from deal_core.data.embedded import requirements_file as f; print(f())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed", capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert said == str(tmp_path / "installed/federated_deal" / REQUIREMENTS)
