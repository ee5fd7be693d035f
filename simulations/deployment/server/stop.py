"""``deal stop``: end a run; its checkpoint stays."""

from __future__ import annotations

from pathlib import Path

from server.events import read_events
from simulations.deployment.flower_home import CONNECTION
from simulations.deployment.server.flower_status import flower_status
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.server.next_command import command
from simulations.deployment.server.submit import run_folder, starts


def stop(folder: ServerFolder, name: str) -> list[str]:
    """Ask the SuperLink to end the run.

    Returns:
        The lines to print.

    Raises:
        UserError: no such run, or the server does not answer.
    """
    folder.settings()
    run = run_folder(folder, name)
    begun = starts(run)
    if not begun:
        return [f"{run.name} was never started; its folder is {run}"]
    numbers = [start["run"] for start in reversed(begun)]
    alive = (n for n in numbers if not flower_status(folder, n).startswith("finished"))
    number = next(alive, numbers[0])
    folder.flower.ask("stop", number, CONNECTION)
    folder.events.write("run_stopped", run=run.name, flower=number)
    return [
        f"stopped {run.name}; the checkpoint after its last step stands",
        f"next: {command(folder, f'submit --resume {run.name}')} goes on from there",
    ]


def was_stopped(folder: ServerFolder, run: Path) -> bool:
    """Return whether ``deal stop`` was called for the run since it was started last."""
    begun = max((float(start["time"]) for start in starts(run)), default=0.0)
    return any(
        event["event"] == "run_stopped" and event["run"] == run.name and event["time"] >= begun
        for event in read_events(folder.events.path)
    )
