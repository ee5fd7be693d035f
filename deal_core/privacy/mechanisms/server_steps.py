"""What an experiment must be for steps that the server takes on sums of gradients."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.privacy.mechanisms.shares import shares_of
from deal_core.privacy.mechanisms.sums_protected import sums_in_place_of_steps
from deal_core.privacy.policy import at_server


def check_steps_at_server(experiment: Experiment) -> None:
    """Check that every site takes part in every round with one gradient sum.

    Raises:
        UserError: it does not, or something else of a site would be seen.
    """
    if not at_server(experiment):
        return
    shares_of(experiment)
    wrong = [f'train.step = "server": {cure}' for bad, cure in _conditions(experiment) if bad]
    if wrong:
        raise UserError(*wrong)


def _conditions(experiment: Experiment) -> list[tuple[bool, str]]:
    """Whether something is wrong, and what to do about it."""
    method, federation = experiment.method, experiment.federation
    sums = sums_in_place_of_steps(experiment) is not None
    return [
        (
            not experiment.aggregation.secure,
            "gradients are added up before anybody sees them; set aggregation.secure to true",
        ),
        (
            experiment.privacy.mechanism == "record" and not experiment.privacy.target_delta,
            "all sites need one delta; set privacy.target_delta",
        ),
        (
            not sums and experiment.adapter.kind == "lora" and experiment.aggregation.rule != "ffa",
            "steps are taken on one factor that keeps its coordinates; set aggregation.rule to "
            "ffa, or adapter.kind to pooled",
        ),
        (
            bool(federation.clients_per_round or federation.participants),
            "every site's share is counted on; leave out federation.clients_per_round and "
            "participants",
        ),
        (
            experiment.stream.schedule != "synchronous",
            'all sites work on one task; set stream.schedule to "synchronous"',
        ),
        (
            any(experiment.stream.joins.values()),
            "every site's share is counted on from the start; leave out stream.joins",
        ),
        (
            not sums and (method.name not in {"deal", "sequential"} or method.update.enabled),
            "the server takes the steps, and has no penalty; set method.name to deal or "
            "sequential, and method.update.enabled to false; or method.name to prototype",
        ),
    ]
