"""Print the table of docs/checking.md; inputs may be named as arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from simulations.output.files import row
from tests.simulations.run.odd_inputs import ODD_INPUTS, OddInput

ROOT = Path(__file__).parents[3]


def seen(odd: OddInput, folder: Path) -> str:
    """Return the line that a fresh ``deal check`` prints of an input; of a good one its last."""
    path = odd.write(folder)
    command = [sys.executable, "-m", "simulations.cli", "check", str(path)]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            if odd.message and odd.message in line:
                process.kill()
                break
        return line.strip().replace(f"{folder}/", "")


def main() -> None:
    """Print one row for each input that is named; where none is, for all."""
    wanted = sys.argv[1:]
    for odd in ODD_INPUTS:
        if wanted and odd.what not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            line = seen(odd, Path(folder))
        print(row(odd.what, f"`{line}`"), flush=True)


if __name__ == "__main__":
    main()
