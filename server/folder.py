"""The run folder: where everything of a run lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def previous_checkpoint(checkpoint: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return checkpoint.with_suffix(".previous")


@dataclass(frozen=True)
class RunFolder:
    """Names inside one run's folder."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """State after the last finished step."""
        return self.path / "checkpoint.safetensors"

    @property
    def previous(self) -> Path:
        """The checkpoint before the last one."""
        return previous_checkpoint(self.checkpoint)

    @property
    def can_resume(self) -> bool:
        """There is a checkpoint, the last or the one before it."""
        return self.checkpoint.exists() or self.previous.exists()

    @property
    def data_record(self) -> Path:
        """What the rows were when the run was started (simulations)."""
        return self.path / "data.json"

    @property
    def writing(self) -> Path:
        """Locked by the server that writes here."""
        return self.path / ".writing.lock"

    @property
    def launching(self) -> Path:
        """Locked by the ``deal`` that started it, perhaps in another process."""
        return self.path / ".launching.lock"

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here, which another must not overwrite."""
        return self.can_resume or self.results.exists()

    @property
    def metrics(self) -> Path:
        """One event a line."""
        return self.path / "metrics.jsonl"

    @property
    def tracking(self) -> Path:
        """A folder for each tracker (``run.track``)."""
        return self.path / "tracking"

    @property
    def results(self) -> Path:
        """Written once, when the run has finished."""
        return self.path / "results.json"

    @property
    def adapter(self) -> Path:
        """The learnt adapter in PEFT's format."""
        return self.path / "adapter"
