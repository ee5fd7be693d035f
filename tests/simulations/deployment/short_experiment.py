"""An experiment that sites run in seconds, and the same in one process to compare with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.simulations.deployment.loopback import SLOW
from tests.simulations.deployment.site_data import LABELS

SHORT = """\
[data]
source = "sites"
tasks = {tasks}
[data.labels]
laboratory = ["Pathology", "Pharmacology"]
surgery = ["Radiology", "Surgery"]
[federation]
rounds = {rounds}
deadline_seconds = {deadline}
[train]
max_length = 32
batch_size = 4
precision = "float32"
[method.prototype]
enabled = "off"  # sites keep sums by default
[run]
threads = 1
"""


def experiment_file(
    path: Path,
    tasks: Sequence[str] = tuple(LABELS),
    rounds: int = 1,
    deadline: float = 300,
) -> Path:
    asked = {"tasks": json.dumps(list(tasks)), "rounds": rounds, "deadline": SLOW * deadline}
    path.write_text(SHORT.format(**asked))
    return path


def alone(path: Path, data: Path, out: Path, sites: Sequence[str]) -> Path:
    """The same experiment in one process, each client with the rows of its site."""
    from deal_core.config.file import apply_overrides, parse_experiment, read_toml
    from simulations.engines.inprocess import run_inprocess

    out.mkdir()
    overrides = [
        "data.source=files",
        f'data.path="{data / "all"}"',
        "data.partition.kind=column",
        "data.partition.column=site",
        f"federation.clients={len(sites)}",
        f'run.out="{out}"',
        "run.workers=1",
    ]
    tables = apply_overrides(read_toml(path), overrides)
    run_inprocess(parse_experiment(tables, "test"), lambda event: None)
    return out


def same_adapter(one: Path, two: Path) -> None:
    """The adapters of two run folders agree to 1e-4."""
    import numpy as np
    from safetensors.numpy import load_file

    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, two))
    assert first.keys() == second.keys() != set()
    for key, value in first.items():
        np.testing.assert_allclose(value, second[key], atol=1e-4)
