"""Privacy mechanisms. A mechanism is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.errors import UserError, choose
from deal_core.methods import make_method, takes_statistics
from deal_core.privacy.interface import MakeMechanism, Mechanism
from deal_core.privacy.mechanisms.client import make_client
from deal_core.privacy.mechanisms.none import make_none
from deal_core.privacy.mechanisms.record import make_record

MECHANISMS: Mapping[str, MakeMechanism] = {
    "none": make_none,
    "record": make_record,
    "client": make_client,
}
"""Name to what it does at a client; what it does at the server is in
:mod:`deal_core.privacy.mechanisms.server_side`."""

UNPROTECTED: Mapping[str, str] = {
    "ewc": "Fisher information of earlier records goes into every update unclipped",
    "replay": "earlier texts are trained on beside the batch",
}
"""Methods whose updates tell of records that are not in the batch, and how."""


def make_mechanism(experiment: Experiment) -> Mechanism:
    """Build the mechanism that the experiment names.

    Raises:
        UserError: unknown ``privacy.mechanism``, or one that cannot protect the experiment.
    """
    name = experiment.privacy.mechanism
    mechanism = choose("privacy.mechanism", name, MECHANISMS)(experiment)
    if mechanism.unit is not None:
        _check_no_sums(experiment)
    if name in CHECKS:
        CHECKS[name](experiment)
    return mechanism


def assumes(privacy: PrivacyConfig) -> str:
    """Whom an epsilon of this mechanism takes to be honest; empty: there is none."""
    if privacy.mechanism == "client" and privacy.trusted_server:
        return "the server is honest"
    return "" if privacy.mechanism == "none" else "nobody outside the client is trusted"


def _check_no_sums(experiment: Experiment) -> None:
    """Sums of embeddings have no noise."""
    if takes_statistics(make_method(experiment.method, experiment.adapter)):
        raise UserError(
            f'privacy.mechanism = "{experiment.privacy.mechanism}" does not go with method.name '
            f"'{experiment.method.name}': its sums of embeddings leave without noise; use deal, "
            "lwf, olora or sequential"
        )


def _check_protected(experiment: Experiment) -> None:
    where, method = f'privacy.mechanism = "{experiment.privacy.mechanism}"', experiment.method.name
    if method in UNPROTECTED:
        raise UserError(
            f"{where} does not go with method.name '{method}': {UNPROTECTED[method]}; use "
            "deal, lwf, olora or sequential"
        )
    if method == "deal-reference" and experiment.privacy.factors == "one":
        raise UserError(
            f"{where} trains one factor a round, method.name '{method}' needs both; set "
            'privacy.factors to "both", or choose another method'
        )
    if experiment.method.logit_adjustment:
        raise UserError(
            f"{where} protects single records, and method.logit_adjustment reads the labels of all "
            "of a site's; set it to 0"
        )
    if experiment.train.precision == "bfloat16":
        raise UserError(
            f'{where} does not go with train.precision = "bfloat16", in which the rounding of a '
            'record\'s gradient depends on other records; set it to "auto" or "float32"'
        )
    _check_one_by_one(experiment)


def _check_one_by_one(experiment: Experiment) -> None:
    """What a mechanism charges names one task, and nothing else is read."""
    if experiment.stream.schedule == "joint":
        raise UserError(
            f'privacy.mechanism = "{experiment.privacy.mechanism}" does not go with '
            'stream.schedule = "joint": set it to "synchronous" or "per-client"'
        )


def _check_clients(experiment: Experiment) -> None:
    """Whatever a client does is inside its update; but one sum needs updates of one shape, and
    nothing may look at single ones."""
    _check_one_by_one(experiment)
    if not experiment.privacy.trusted_server:
        return
    where = 'privacy.mechanism = "client"'
    if experiment.aggregation.robust != "none":
        raise UserError(
            f"{where} does not go with aggregation.robust '{experiment.aggregation.robust}': the "
            "server may look at no single update; set it to none"
        )
    if experiment.adapter.client_ranks:
        raise UserError(
            f"{where} sums updates of one shape; leave adapter.client_ranks empty, or set "
            "privacy.trusted_server to false"
        )


CHECKS: Mapping[str, Callable[[Experiment], None]] = {
    "record": _check_protected,
    "client": _check_clients,
}
"""What must hold for a mechanism to protect an experiment."""
