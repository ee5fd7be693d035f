"""Privacy mechanisms. A mechanism is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.config import Experiment
from deal_core.errors import UserError, choose
from deal_core.privacy.interface import MakeMechanism, Mechanism
from deal_core.privacy.none import make_none
from deal_core.privacy.record import make_record

MECHANISMS: Mapping[str, MakeMechanism] = {"none": make_none, "record": make_record}

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
    if name != "none":
        _check_protected(experiment)
    return mechanism


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
    if experiment.stream.schedule == "joint":
        raise UserError(
            f'{where} does not go with stream.schedule = "joint": set it to "synchronous" or '
            '"per-client"'
        )
