"""What a reader pastes from docs/DEPLOYMENT.md is ready for one machine, without a proxy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from client.site_file import read_site
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.site.check import check_site
from simulations.run.experiment import Request, load_experiment
from tests.docs.pages import ROOT, fences


def test_what_the_page_makes_is_ready_and_names_the_port_that_listens(tmp_path: Path) -> None:
    blocks = fences(ROOT / "docs/DEPLOYMENT.md")
    (block,) = [each.text for each in blocks if each.text.startswith("mkdir -p one/")]
    deal = f'deal() {{ "{sys.executable}" -m simulations.cli "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        ["bash", "-e", "-c", deal + block], cwd=tmp_path, env=environment, check=True, timeout=240
    )
    experiment = load_experiment(Request(str(tmp_path / "one/triage.toml")))
    settings = ServerFolder(tmp_path / "one/server").settings()
    for name in ("north", "south"):
        site = tmp_path / "one" / name
        report = check_site(site, experiment, offline=True)
        assert (report.problems, report.warnings) == ([], [])
        assert read_site(site / "site.toml").server.address == settings.local_address
