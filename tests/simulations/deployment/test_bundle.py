"""What ``flwr run`` uploads to the server and to every site: code, and nothing else."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

from simulations.deployment.flower_home import FlowerHome
from simulations.deployment.server.certificates import make_authority
from simulations.deployment.site_keys import make_key_pair
from simulations.engines.flower import app_folder
from simulations.engines.flower_sandbox import program

BESIDE = {"pyproject.toml", ".info/CONTENT", "LICENSE", "README.md"}


def test_the_bundle_holds_code_only(tmp_path: Path) -> None:
    """Also with keys and data lying about in the checkout."""
    copy = tmp_path / "app"
    for room in ("server", "client", "deal_core"):
        for source in (app_folder() / room).rglob("*.py"):
            target = copy / source.relative_to(app_folder())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((app_folder() / name).read_bytes())
    secret = make_key_pair("north").private
    for place in ("site.key", "client/site.key", "server/ca.key", "client/data/train.jsonl"):
        (copy / place).parent.mkdir(parents=True, exist_ok=True)
        (copy / place).write_bytes(secret)
    (copy / "server" / "ca.crt").write_bytes(make_authority().certificate)
    home = FlowerHome(tmp_path / "flower")
    home.make()
    command = [program("flwr"), "build", "--app", str(copy)]
    subprocess.run(command, cwd=home.empty, env=home.environment(), check=True, timeout=400)
    (built,) = home.empty.glob("*.fab")
    with zipfile.ZipFile(built) as bundle:
        names = set(bundle.namelist())
        held = b"".join(bundle.read(name) for name in names)
    code = {name for name in names if name.endswith(".py")}
    assert {"server/app.py", "client/app.py", "deal_core/config/experiment.py"} <= code
    assert {name.split("/")[0] for name in code} == {"server", "client", "deal_core"}
    assert names - code <= BESIDE
    assert b"PRIVATE KEY-----" not in held
