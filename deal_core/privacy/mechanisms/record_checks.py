"""What an experiment must be for single records, or groups of them, to be protected."""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.errors import UserError
from deal_core.privacy.mechanisms.definition import nobody_trusted
from deal_core.privacy.mechanisms.shares import trust_in_sum
from deal_core.privacy.policy import at_server, in_sum

READ_BATCHES_ALONE: Mapping[str, str] = {
    "deal": "penalties of adapters; distillation and class sums on the records of the batch",
    "deal-reference": "gates on the spectrum of adapters",
    "linear-probe": "sums over records, which are checked by themselves",
    "lwf": "distillation on the records of the batch",
    "olora": "a penalty on factors",
    "prototype": "sums over records, which are checked by themselves",
    "sequential": "cross-entropy alone",
    "slao": "merges adapters",
}
"""Methods of whose updates nothing tells of a record but its clipped gradient, or its part of a
noised sum; and of what the rest is made. A penalty is added after the noise: it must read no
record. One that is not named here runs under no such mechanism."""
UNPROTECTED: Mapping[str, str] = {
    "ewc": "Fisher information of earlier records goes into every update unclipped",
    "replay": "earlier texts are trained on beside the batch",
}
"""Methods whose updates tell of records that are not in the batch, and how."""


def check_records_protected(experiment: Experiment) -> None:
    """Check that nothing but the records of a batch reaches an update.

    Raises:
        UserError: the experiment has a part that reads others.
    """
    where, method = f'privacy.mechanism = "{experiment.privacy.mechanism}"', experiment.method.name
    if method not in READ_BATCHES_ALONE:
        unknown = "nothing says that its penalty reads no record (READ_BATCHES_ALONE)"
        raise UserError(
            f"{where} does not go with method.name '{method}': {UNPROTECTED.get(method, unknown)}; "
            "use deal, lwf, olora, sequential or slao"
        )
    if method == "deal-reference" and experiment.privacy.factors == "one":
        raise UserError(
            f"{where} trains one factor a round, method.name '{method}' needs both; set "
            'privacy.factors to "both", or choose another method'
        )
    if experiment.train.precision == "bfloat16":
        raise UserError(
            f'{where} does not go with train.precision = "bfloat16", in which the rounding of a '
            'record\'s gradient depends on other records; set it to "auto" or "float32"'
        )
    if experiment.privacy.unit_column and experiment.data.max_train:
        raise UserError(
            f"{where} with privacy.unit_column protects groups, and which records "
            "data.max_train takes depends on how many a group has; set it to 0, and take fewer "
            "groups by data.train_share"
        )
    noised = experiment.privacy.metrics == "noised"
    if experiment.privacy.unit_column and noised and experiment.data.max_test:
        raise UserError(
            f"{where} with privacy.unit_column protects groups, and which test records "
            "data.max_test takes depends on how many a group has; set it to 0"
        )
    if experiment.stream.schedule == "joint":  # a charge names the task that was read
        raise UserError(
            f'{where} does not go with stream.schedule = "joint": set it to "synchronous" or '
            '"per-client"'
        )
    if in_sum(experiment.privacy) and not at_server(experiment):
        raise UserError(
            'privacy.noise_share = "sum": only one sum has the whole noise; set train.step to '
            '"server"'
        )


def whom_to_trust(privacy: PrivacyConfig) -> str:
    """Return whom an epsilon takes to be honest."""
    return trust_in_sum(privacy) if in_sum(privacy) else nobody_trusted(privacy)
