"""Folders in which commands of the pages find what they name."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from deal_core.privacy.ledger import Budget, Ledger
from simulations import cli
from simulations.engines.inprocess import run_inprocess
from tests.docs.pages import ROOT, fences
from tests.ledger_events import ledger_event
from tests.simulations.runs import at

PLACES = {
    "/srv/deal/runs/RUN": "runs/mine",
    "/srv/deal-site/state/runs/RUN/adapter": "runs/quickstart-seed0",
    "/srv/deal-site/state": "STATE",
    "/srv/deal-site": "site",
    "/srv/deal": "server",
    "/srv/data": "data",
}
"""Absolute paths of the pages, the longest first, to places below the prepared folder."""
SENTENCES = [
    {"label": "World", "sentence": "They voted."},
    {"label": "Sports", "sentence": "They won."},
]


def call(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Call ``deal`` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [*words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def below(word: str) -> str:
    """A word with a path of the pages in its place below the prepared folder."""
    for path, place in PLACES.items():
        if word == path:
            return place
    return word


def own_rows(folder: Path) -> None:
    """The rows and the experiment file of docs/tutorial.md; each patient has two rows."""
    (program,) = heredocs("python -")
    (experiment,) = heredocs("cat > my.toml")
    exec(compile(program, "docs/tutorial.md", "exec"), {})
    Path("my.toml").write_text(experiment)
    for path in folder.glob("data/*/train.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["text", "label", "patient_id"])
            table.writeheader()
            table.writerows(row | {"patient_id": f"{n // 2}"} for n, row in enumerate(rows))


def heredocs(command: str) -> list[str]:
    """What the tutorial gives to a command."""
    pattern = re.compile(rf"{re.escape(command)} <<'END'\n(.*?)^END$", re.DOTALL | re.MULTILINE)
    blocks = fences(ROOT / "docs/tutorial.md")
    return [found[1] for block in blocks if (found := pattern.match(block.text))]


def finished_runs(folder: Path, experiment: Experiment) -> None:
    """One run under the names that the pages use."""
    first = folder / "runs/quickstart-seed0"
    run_inprocess(at(experiment, first), lambda event: None)
    for name in ("mine", "lwf", "one", "two"):
        shutil.copytree(first, folder / "runs" / name)


def institutions(folder: Path) -> None:
    """What a site has before it is made: an experiment, a certificate, and the state of a site."""
    blocks = fences(ROOT / "docs/DEPLOYMENT.md")
    (experiment,) = (b.text for b in blocks if b.text.startswith('description = "Two tasks'))
    (folder / "two-tasks.toml").write_text(experiment)
    Ledger(folder / "STATE").charge(ledger_event(), Budget(100.0, 1e-4), "r1", b"x")


def benchmark(folder: Path, save: Callable[[Path, object], None]) -> None:
    """A folder of the shape of O-LoRA's."""
    task = folder / "CL_Benchmark/TC/agnews"
    for split in ("train", "dev", "test"):
        save(task / f"{split}.json", SENTENCES)
    save(task / "labels.json", ["World", "Sports"])
