"""The project from Python: whole runs, what they have learnt, and the parts of a round.

Every name here is described in docs/python.md. Nothing is printed.
"""

from deal_core.aggregation.rule import ClientUpdate
from deal_core.config.experiment import Experiment
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.inference.folder import Answer, Written
from server.results import Results
from simulations.api.rounds import (
    Aggregated,
    aggregate,
    begin_task,
    end_task,
    evaluate,
    load_base,
    start,
    train_client,
)
from simulations.api.runs import Run, experiment, load_run, run

__all__ = [
    "Aggregated",
    "Answer",
    "ClientUpdate",
    "Example",
    "Experiment",
    "Results",
    "Run",
    "UserError",
    "Written",
    "aggregate",
    "begin_task",
    "end_task",
    "evaluate",
    "experiment",
    "load_base",
    "load_run",
    "run",
    "start",
    "train_client",
]
