"""The audit of mechanism ``client`` with a trusted server: canary clients in its noisy means.

The rounds are those of the experiment, the server's part of the mechanism is what a run has:
drawing, clipping, noise, plan and ledger. Nothing is trained, since an update of a client's data is
no worse than a canary.
"""

from __future__ import annotations

from pathlib import Path

from deal_core.aggregation import make_rule
from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.lora.adapter import zero_adapter
from deal_core.methods import method_of
from deal_core.methods.interface import phases_after
from deal_core.models import adapter_shapes
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.canary_clients import CanaryClients
from deal_core.privacy.audit.guesses import guess
from deal_core.privacy.mechanisms.registry import make_mechanism, make_server_side
from deal_core.privacy.mechanisms.server_side import RoundContext, ServerSide
from server.events import Listener
from server.plan import make_plan
from server.schedule import Step, private_rounds, schedule
from simulations.audit.found import Found, Training, outcomes_of, steps_of


def canary_clients(training: Training, listener: Listener) -> Found:
    """Return what was found of canary clients, scored on every model that the server hands out.

    Raises:
        UserError: no noise that is of use fits the budget.
    """
    config = training.experiment
    canaries = GradientCanaries(training.canaries, training.seed, training.repeat)
    side = _server_side(config, training.folder)
    mechanism, rule = make_mechanism(config), make_rule(config.aggregation)
    scores = CanaryClients(canaries, config.privacy.max_update_norm).scores(
        side,
        zero_adapter(adapter_shapes(config.model, config.adapter), config.adapter.rank),
        lambda server_round: mechanism.trained(rule.trained(server_round)),
        _private_rounds(config, training.canaries),
    )
    figures = side.spent(["a canary"], 1).get("a canary", {})
    delta = figures.get("delta", training.delta)
    return Found(
        kind=training.kind,
        client=training.client,
        canaries=training.canaries,
        records=training.records,
        seed=training.seed,
        repeat=training.repeat,
        mechanism=config.privacy.mechanism,
        unit=mechanism.unit,
        simulation_only=bool(figures.get("simulation_only")),
        claimed=figures.get("epsilon"),
        delta=delta,
        spent=steps_of(Ledger(training.folder / "privacy").events()),
        outcomes=outcomes_of(guess(scores, canaries.included)),
    )


def _server_side(experiment: Experiment, folder: Path) -> ServerSide:
    """Return the mechanism at the server as a run has it, with its ledger in ``folder``."""
    rounds = len(_private_steps(experiment))
    if experiment.privacy.mechanism == "none":  # everybody is in the mean: nothing is hidden
        everybody = experiment.federation.model_copy(update={"clients_per_round": 0})
        experiment = experiment.model_copy(update={"federation": everybody})
    return make_server_side(experiment, rounds, Ledger(folder / "privacy"))


def _private_rounds(experiment: Experiment, clients: int) -> list[RoundContext]:
    """Return the rounds of a run that learn from clients' data."""
    steps = _private_steps(experiment)
    return [RoundContext(step.phase, step.stage, step.server_round, clients) for step in steps]


def _private_steps(experiment: Experiment) -> list[Step]:
    plan = make_plan(experiment, open_source(experiment.data).task_names(), ["a client"])
    method = method_of(experiment)
    steps = schedule(plan.stages, phases_after(method))
    return private_rounds(steps)
