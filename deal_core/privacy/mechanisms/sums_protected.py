"""Which sums of embeddings a mechanism protects: class sums with noise in a secure sum, and no
others."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import Statistics, method_of, phases_of, statistics_of, sums_beside_learning
from deal_core.privacy.policy import at_server
from deal_core.wire.instruction import LEARN


def check_sums_protected(experiment: Experiment) -> None:
    """Check that the method takes no sums over single records that leave without noise.

    Raises:
        UserError: it does; or its sums are planned for more rounds than they are given in.
    """
    method = method_of(experiment)
    hidden = experiment.privacy.mechanism == "record" and sums_beside_learning(method)
    if statistics_of(method) is None or hidden:
        return
    noised = sums_in_place_of_steps(experiment)
    if noised is None or experiment.privacy.mechanism != "record":
        raise UserError(
            f'privacy.mechanism = "{experiment.privacy.mechanism}" does not go with method.name '
            f"'{experiment.method.name}': its sums of embeddings leave without noise; use deal, "
            "lwf, olora, sequential or slao; or prototype with noise in a secure sum "
            '(train.step = "server")'
        )
    if experiment.federation.rounds != 1:
        raise UserError(
            "class sums with noise are given once in a task, and every round is charged; set "
            "federation.rounds to 1"
        )


def sums_in_place_of_steps(experiment: Experiment) -> Statistics | None:
    """Return what clients add up in the place of learning, with noise where a mechanism wants it;
    None: they train, or the method has no use for sums with noise."""
    learn = phases_of(method_of(experiment))[LEARN].statistics
    usable = learn is not None and learn.exact is None
    return learn if usable and at_server(experiment) else None
