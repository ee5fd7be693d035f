from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.errors import UserError
from server.folder import RunFolder, exclusive_lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from server.folder import exclusive_lock

with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_alone_writes_and_a_dead_one_is_in_nobodys_way(tmp_path: Path) -> None:
    lock = RunFolder(tmp_path / "new" / "run").writing
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run: another process is writing.*--out$"):
            exclusive_lock(lock).__enter__()
        other.kill()
    assert lock.exists()
    with exclusive_lock(lock):
        pass
    with exclusive_lock(lock):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"taken/run: cannot be written .*; choose another --out"):
        exclusive_lock(RunFolder(tmp_path / "taken" / "run").writing).__enter__()
