"""The project from Python: clients and a strategy around one's own model, and whole runs.

Every name here is described in docs/python.md. Nothing is printed.
"""

from deal_core.config.experiment import Experiment
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.inference.folder import Answer, Written
from server.results import Results
from simulations.api.client import DealClient, patch
from simulations.api.nouns import Deal, RecordDP
from simulations.api.runs import Run, experiment, load_run, run
from simulations.api.server import DealStrategy, simulate

__all__ = [
    "Answer",
    "Deal",
    "DealClient",
    "DealStrategy",
    "Example",
    "Experiment",
    "RecordDP",
    "Results",
    "Run",
    "UserError",
    "Written",
    "experiment",
    "load_run",
    "patch",
    "run",
    "simulate",
]
