"""The same stream under several methods: accuracy and forgetting side by side."""

import tempfile
from pathlib import Path

from simulations.api import experiment, run

base = experiment(
    {
        "data": {"tasks": ["laboratory", "surgery"], "max_train": 80, "max_test": 60},
        "federation": {"clients": 2, "rounds": 1},
        "train": {"max_length": 32},
    }
)

print(f"{'method':<12}{'accuracy':>10}{'forgetting':>12}{'seconds':>9}")
with tempfile.TemporaryDirectory() as folder:
    for method in ("sequential", "lwf", "deal"):
        found = run(base, {"method.name": method}, out=Path(folder) / method).results
        seconds = found.seconds["total"]
        print(
            f"{method:<12}{found.average_accuracy:>10.3f}{found.forgetting:>12.3f}{seconds:>9.0f}"
        )
