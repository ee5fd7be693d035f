"""One experiment from its name to its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, choose
from server.folder import OTHER_OUT, Listener, RunFolder, held
from simulations.engines import ENGINES, warm_up
from simulations.engines.interrupt import STOPPED, stoppable
from simulations.output import print_line
from simulations.run.check import preflight
from simulations.run.experiment import Request, load_experiment
from simulations.run.progress import told_to
from simulations.run.run_folder import check_folder, claimed

WAITS = "the clients at work end what they do, then the report is written"


def simulate(
    request: Request, console: Console, write_page: Callable[[Path], None] = lambda folder: None
) -> int:
    """Run the experiment, show it, report it.

    Args:
        request: what was typed.
        console: for people.
        write_page: called with the run folder of a run that has begun, however it ended.

    Returns:
        The exit code: 0; 130 where it was stopped.

    Raises:
        UserError: bad input (nothing has started), or a run that cannot go on.
    """
    experiment = load_experiment(request)
    folder = Path(experiment.run.out)
    before = _events(folder)
    check_folder(experiment)
    if RunFolder(folder).results.exists():
        print_line(console, f"{folder}: the run has finished, nothing is left to do")
        return 0
    try:
        with stoppable(WAITS):
            with console.status("checking the experiment and its data"):
                engine = prepare(experiment, lambda line: print_line(console, f"warning: {line}"))
            with claimed(experiment):
                engine(experiment, told_to(console))
    except BaseException as stop:
        if _events(folder) != before:
            write_page(folder)
        if not isinstance(stop, KeyboardInterrupt):
            raise
        for line in stopped_lines(RunFolder(folder)):
            print_line(console, line)
        return STOPPED
    from simulations.run.summary import print_report

    print_report(console, folder)
    write_page(folder)
    return 0


def _events(folder: Path) -> int:
    """Bytes of a run's log; 0: it has none."""
    log = RunFolder(folder).metrics
    return log.stat().st_size if log.is_file() else 0


def prepare(
    experiment: Experiment, warn: Callable[[str], None]
) -> Callable[[Experiment, Listener], None]:
    """Make every check that can be made before the run starts; ``warn`` hears of warnings.

    Returns:
        The engine, which runs it.

    Raises:
        UserError: bad input; nothing has started.
    """
    check_folder(experiment)
    if held(RunFolder(Path(experiment.run.out)).launching):
        raise UserError(f"{experiment.run.out}: another process is writing this run; {OTHER_OUT}")
    engine = choose("run.engine", experiment.run.engine, ENGINES)
    warm_up(experiment)
    preflight(experiment, warn)
    return engine


def stopped_lines(folder: RunFolder) -> list[str]:
    """Say what is left of an interrupted run, and with which command it goes on."""
    if not folder.can_resume:
        return ["stopped before the first checkpoint; start again with the same command"]
    typed = [word for word in sys.argv[1:] if word != "--resume"]
    return [
        f"stopped; the checkpoint is in {folder.path}; continue with",
        f"  {shlex.join(['deal', *typed, '--resume'])}",
    ]
