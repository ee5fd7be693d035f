"""What an experiment must be for updates that are only seen as one sum."""

from __future__ import annotations

from deal_core.aggregation import MEANS_OF_FACTORS
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.kinds import rule_of
from deal_core.methods import method_of, statistics_of
from deal_core.privacy.policy import require_comparable
from deal_core.secure_sum.terms import LEAST_SITES

COUNTED = {"clients", "sites"}
"""Keys that say how many clients there are."""


def check_secure(experiment: Experiment) -> None:
    """A secure sum shows no single update, so nothing may be done that needs one.

    Raises:
        UserError: something does.
    """
    config, name = experiment.aggregation, experiment.method.name
    if experiment.privacy.metrics == "summed" and not config.secure:
        raise UserError(
            'privacy.metrics = "summed": counts are added up before anybody sees them; set '
            "aggregation.secure to true"
        )
    if not config.secure:
        return
    rule = rule_of(experiment.adapter, config)
    if rule not in MEANS_OF_FACTORS:
        raise UserError(
            f"aggregation.secure: rule '{rule}' is no mean of factors; use "
            f"{', '.join(sorted(MEANS_OF_FACTORS))}"
        )
    if config.robust != "none":
        raise UserError(
            f"aggregation.secure: aggregation.robust '{config.robust}' judges single updates, and "
            "only their sum is seen; set it to none"
        )
    if experiment.wire.dtype != "float32":
        raise UserError("aggregation.secure has a format of its own; set wire.dtype to float32")
    per_client = experiment.stream.schedule == "per-client"
    if per_client and statistics_of(method_of(experiment)) is not None:
        raise UserError(
            f"aggregation.secure: a sum of method.name '{name}' is of one task, and clients work "
            'on others at a time; set stream.schedule to "synchronous"'
        )
    require_comparable(experiment)
    if experiment.faults.clients:
        raise UserError(
            "faults.clients: what leaves under aggregation.secure is masked, and cannot be spoilt "
            "on its way; leave it out, or set aggregation.secure to false"
        )
    check_cohort(experiment)


def check_cohort(experiment: Experiment) -> None:
    """A sum hides nothing among too few, or where too many of them work together. How many sites
    will take part may not be known yet: then it is checked when a run is submitted.

    Raises:
        UserError: it is among too few, or too many may.
    """
    federation = experiment.federation
    if experiment.data.source == "sites" and federation.model_fields_set.isdisjoint(COUNTED):
        return
    everybody = len(federation.sites) or federation.clients
    training = set(map(str, federation.participants or range(everybody)))
    late = {name for name, over in experiment.stream.joins.items() if over}
    clients = min(federation.clients_per_round or len(training), len(training - late))
    least, colluding = experiment.aggregation.min_cohort, experiment.privacy.colluding
    if clients < LEAST_SITES:
        raise UserError(
            f"aggregation.secure needs {LEAST_SITES} clients in a round: in a sum of two each "
            "knows the other's part; raise federation.clients"
        )
    if least > clients:
        raise UserError(
            f"aggregation.min_cohort is {least}, and a round has {clients} clients; lower it"
        )
    if colluding > clients - 2:
        raise UserError(
            f"privacy.colluding is {colluding}: of {clients} clients in a round, that leaves no "
            "two whose parts the sum could hide; lower it"
        )
