"""What of a run's events a tracker draws: numbers, by name and by round over the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.checkpoint import EVERYBODY
from server.folder import RunEvent

OF_A_ROUND = ("seconds", "clients", "aggregation_error", "bytes_up", "bytes_down")
OF_A_RUN = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")


class RunFigures:
    """Turns events into lines of a tracker. It remembers the round, and the losses in it.

    No epsilon: a curve has no room for what it means; the report has it.
    """

    def __init__(self) -> None:
        self._round = 0
        self._losses: dict[str, tuple[float, float]] = {}
        """Client to the loss and number of examples of the round, where it says both; or the mean
        in a secure sum, and 1."""

    def line(self, event: RunEvent) -> dict[str, Any] | None:
        """Return the line that an event gives, or None: see :mod:`server.tracking.lines`."""
        kind = event["event"]
        self._round = event.get("round", self._round)
        if kind == "client_finished" and "loss" in event and "num_examples" in event:
            self._losses[event["client"]] = event["loss"], event["num_examples"]
        elif kind == "client_failed" and event.get("server_round", 1):  # held beside the others
            self._losses.pop(event["client"], None)
        elif kind == "loss_summed":  # the mean over clients, in a secure sum
            self._losses[EVERYBODY] = event["loss"], 1.0
        elif kind == "round_finished":
            return self._line({f"round/{key}": event.get(key) for key in OF_A_ROUND} | self._loss())
        elif kind == "evaluated":
            # Before the first task is learnt nothing is: that evaluation comes with round 1.
            step = 0 if event["stage"] < 0 else self._round
            return self._line(_accuracies(event), step)
        elif kind == "run_finished":
            final = {f"final/{key}": event.get(key) for key in OF_A_RUN}
            return {**(self._line(final) or {}), "finished": True}
        return None

    def _loss(self) -> dict[str, float]:
        """Return the mean over examples of the round, and forget it."""
        losses, self._losses = list(self._losses.values()), {}
        examples = sum(number for _, number in losses)
        if not examples:
            return {}
        return {"train/loss": sum(loss * number for loss, number in losses) / examples}

    def _line(
        self, figures: Mapping[str, float | None], step: int | None = None
    ) -> dict[str, Any] | None:
        known = {name: float(value) for name, value in figures.items() if value is not None}
        return {"step": self._round if step is None else step, "figures": known} if known else None


def _accuracies(event: RunEvent) -> dict[str, float]:
    """Return the accuracy on every task, in both protocols."""
    own = {f"accuracy/{task}": value for task, value in event.get("accuracy", {}).items()}
    joint = event.get("class_incremental", {})
    return own | {f"accuracy_all_labels/{task}": value for task, value in joint.items()}
