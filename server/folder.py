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
    def writing(self) -> Path:
        """Locked by the server that writes here."""
        return self.path / ".writing.lock"

    @property
    def launching(self) -> Path:
        """Locked by the ``deal`` that started it, perhaps in another process."""
        return self.path / ".launching.lock"

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
