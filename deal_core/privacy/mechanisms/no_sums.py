"""What no mechanism protects: sums of embeddings."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import method_of, statistics_of


def check_no_sums(experiment: Experiment) -> None:
    """Check that the method takes no sums over single records: they leave without noise.

    Raises:
        UserError: it does.
    """
    if statistics_of(method_of(experiment)) is not None:
        raise UserError(
            f'privacy.mechanism = "{experiment.privacy.mechanism}" does not go with method.name '
            f"'{experiment.method.name}': its sums of embeddings leave without noise; use deal, "
            "lwf, nlora, olora, sequential or slao"
        )
