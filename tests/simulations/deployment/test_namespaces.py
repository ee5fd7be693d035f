"""Server and sites in network namespaces of their own, with the reverse proxy between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulations.deployment.loopback import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def namespaces_are_allowed() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "nginx"))):
        return False
    return subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0


@pytest.mark.skipif(not namespaces_are_allowed(), reason="needs nginx, and the right to unshare")
def test_sites_behind_cables_reach_the_fleet_interface_and_nothing_else(tmp_path: Path) -> None:
    body = [sys.executable, "-m", "tests.simulations.deployment.namespaces", str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-n", *body],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
