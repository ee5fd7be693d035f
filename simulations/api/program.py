"""A program that calls :func:`~simulations.api.simulate`, run again, up to that call, in every
process of Flower's that works for it: objects of a program cannot be sent, and a site runs its own.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from deal_core.config.experiment import Experiment
from deal_core.config.file import from_run_config
from deal_core.errors import UserError

PROGRAM = "DEAL_PROGRAM"
"""Variable of such a process: the call's number, the folder, and what was typed, as JSON."""
calls = count()
"""Numbers of the calls in this process, in their order."""
APP = f"from {__name__} import client_app, server_app\n__all__ = ['client_app', 'server_app']\n"
"""What ``flwr run`` sends."""


class Startable(Protocol):
    """What is needed of a strategy."""

    experiment: Experiment

    def start(self, grid: Grid) -> object:
        """Run to the end."""


class Reached(BaseException):
    """The call is here, with its clients and strategy; nothing in a program should catch it."""

    def __init__(self, clients: Sequence[ClientApp], strategy: Startable) -> None:
        super().__init__("simulate")
        self.clients, self.strategy = clients, strategy


def environment(call: int) -> dict[str, str]:
    """Return the variables of processes that run this program up to a call.

    Raises:
        UserError: it has no file.
    """
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        raise UserError(
            "simulate: this engine runs the program again in processes of its own; save it as a "
            'file and run that, or use engine="inprocess"'
        )
    return {PROGRAM: json.dumps([call, os.getcwd(), str(Path(path).resolve()), *sys.argv[1:]])}


def hand_over(call: int, clients: Sequence[ClientApp], strategy: Startable) -> bool:
    """Give the clients and the strategy of a call to the run that this process works for.

    Returns:
        Whether it works for one, to which this call is an earlier one, that has finished.

    Raises:
        Reached: it is the call.
    """
    if PROGRAM not in os.environ:
        return False
    if json.loads(os.environ[PROGRAM])[0] == call:
        raise Reached(clients, strategy)
    return True


@cache
def reached() -> Reached:
    """Return the call, after all of the program before it; once in a process."""
    _, folder, *typed = json.loads(os.environ[PROGRAM])
    os.chdir(folder)
    sys.argv = typed
    sys.path.insert(0, str(Path(typed[0]).parent))
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__file__ = typed[0]
    try:
        exec(compile(Path(typed[0]).read_bytes(), typed[0], "exec"), main.__dict__)
    except Reached as found:
        return found
    raise UserError(f"{typed[0]}: run again, it did not come to the same call of simulate")


class _Clients(ClientApp):
    """The client of a node's number."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        return reached().clients[int(context.node_config["partition-id"])](message, context)


client_app, server_app = _Clients(), ServerApp()


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    strategy = reached().strategy
    strategy.experiment = from_run_config(context.run_config)
    strategy.start(grid)
