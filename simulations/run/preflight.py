"""Every error in the input shows before anything starts."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, choose
from server.tracking.tracker import check_tracker
from simulations.check.finding import Check, reading, run_checks
from simulations.check.quick import QUICK, ROWS
from simulations.engines.faults import FAULTS
from simulations.run.data_checks import (
    check_answers,
    check_data,
    check_declared,
    check_lengths,
)
from simulations.run.name_checks import (
    check_mechanism,
    check_method,
    check_model,
    check_model_names,
    check_wire,
)
from simulations.run.room_check import check_room
from simulations.run.rule_checks import check_adapter_kind, check_aggregation
from simulations.run.secure_checks import check_secure
from simulations.run.statistics_checks import check_statistics
from simulations.run.text_lengths import check_text_lengths


def preflight(experiment: Experiment) -> None:
    """Look up every name, read and divide every task once, build the model without weights, and see
    whether its checkpoint has them all.

    Raises:
        UserError: all that is wrong, a line each with the place and the cure.
    """
    found = run_checks((*QUICK, *CHECKS), experiment)
    if errors := [finding.text for finding in found if finding.kind == "error"]:
        raise UserError(*errors)


def check_names(experiment: Experiment) -> None:
    """Look up every name, and check what must go together; cheap.

    Raises:
        UserError: one line with the place and the cure.
    """
    for check in NAMES:
        check.find(experiment)


def check_faults(experiment: Experiment) -> None:
    """Misbehaving clients exist in the engine ``inprocess`` alone.

    Raises:
        UserError: unknown kind, or another engine.
    """
    choose("faults.kind", experiment.faults.kind, FAULTS)
    if experiment.faults.clients and experiment.run.engine != "inprocess":
        raise UserError(
            "faults.clients: only the engine 'inprocess' has misbehaving clients; leave them out, "
            "or use --engine inprocess"
        )


TABLES = tuple(Experiment.model_fields)
MODEL, METHOD = "the model's names", "the method's name"
SHAPES = "the model's layers"


NAMES = (
    Check(check_declared, reading("data")),
    Check(check_method, reading("method"), settles=METHOD),
    Check(check_model_names, reading("model", "adapter"), settles=MODEL),
    Check(check_aggregation, reading("aggregation", "method", "adapter")),
    Check(check_adapter_kind, reading("adapter", "method", "model", MODEL)),
    Check(check_secure, reading(*TABLES, METHOD, MODEL)),
    Check(check_wire, reading("wire")),
    Check(check_mechanism, reading(*TABLES, METHOD, MODEL)),
    Check(check_statistics, reading(*TABLES, METHOD, MODEL)),
    Check(check_answers, reading("model", "data", "method", MODEL)),
    Check(check_lengths, reading("train", "model", MODEL)),
    Check(check_faults, reading("faults", "run")),
    Check(check_tracker, reading("run")),
)
"""Names, and what must go together."""
CHECKS = (
    *NAMES,
    Check(
        check_data, reading("data", "stream", "federation", "run", "privacy", "model", ROWS, MODEL)
    ),
    Check(check_model, reading("model", "adapter", MODEL), settles=SHAPES),
    Check(check_room, reading(*TABLES, METHOD, ROWS, SHAPES)),
    Check(check_text_lengths, reading("train", "model", "data", ROWS, MODEL)),
)
"""All that needs torch, after the quick ones."""
