"""The environment of every program of Flower's: a private home, nothing phoned home."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of this process with Flower's own settings in it.

    Args:
        home: where Flower keeps its files.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
