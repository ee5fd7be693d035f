"""The run folder: where everything of a run lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Names inside one run's folder."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """State after the last finished step."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """One event a line."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """Written once, when the run has finished."""
        return self.path / "results.json"

    @property
    def adapter(self) -> Path:
        """The learnt adapter in PEFT's format."""
        return self.path / "adapter"
