"""Of how many sites the noise of a sum is counted on, and whom that takes to be honest."""

from __future__ import annotations

import math

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.errors import UserError
from deal_core.methods import Statistics
from deal_core.privacy.accounting.common_noise import (
    common_noise_multiplier,
    sums_noise_multiplier,
)
from deal_core.privacy.accounting.shared_noise import density_gap
from deal_core.privacy.mechanisms.noisy_sum import GRID_BITS
from deal_core.privacy.policy import Policy, at_server, in_sum
from deal_core.secure_sum.terms import LEAST_SITES, threshold


def shares_of(experiment: Experiment) -> int:
    """Return of how many sites the noise must suffice: of all but those that may collude or fail;
    of one where each adds the whole.

    Raises:
        UserError: of none.
    """
    clients, privacy = experiment.federation.clients, experiment.privacy
    if not in_sum(privacy):
        return 1
    shares = clients - privacy.colluding - privacy.dropouts
    if shares < 1:
        raise UserError(
            f"privacy.colluding = {privacy.colluding} and privacy.dropouts = {privacy.dropouts} "
            f"leave nobody's noise among {clients} clients; lower them, or let more take part"
        )
    return shares


def sum_deviation(experiment: Experiment, tasks: int) -> float:
    """Return the standard deviation of the noise of all sites together, in each entry of a sum and
    in clipping bounds; 0 without a mechanism.

    Args:
        experiment: rounds, rate, budget, and of how many sites the noise suffices.
        tasks: of the run.
    """
    if experiment.privacy.mechanism == "none":
        return 0.0
    added = math.sqrt(experiment.federation.clients / shares_of(experiment))
    return common_noise_multiplier(experiment, tasks) * added


def class_sum_noise(
    experiment: Experiment, statistics: Statistics, members: int, tasks: int
) -> tuple[float, int]:
    """Return the noise multiplier of a class sum, and of how many sites it is counted on.

    Args:
        experiment: its mechanism decides; without one ``statistics`` does.
        statistics: what is added up.
        members: sites that are asked for their part of the sum.
        tasks: of the run.
    """
    if experiment.privacy.mechanism == "none":
        colluding = experiment.privacy.colluding
        fewest = max(LEAST_SITES, threshold(members, colluding))  # those that may be left of them
        return statistics.noise_multiplier, max(1, fewest - colluding)
    beside = sums_noise_multiplier(experiment, tasks)
    return beside or common_noise_multiplier(experiment, tasks), shares_of(experiment)


def slack_of(
    experiment: Experiment, noise_multiplier: float, entries: int, summed: bool = False
) -> float:
    """Return what a step costs because the noise of a sum is not quite a Gaussian's: (M60); 0 where
    sites take steps of their own, unless records are ``summed``."""
    if not at_server(experiment) and not summed:
        return 0.0
    sigma = noise_multiplier * 2**GRID_BITS
    return 2 * density_gap(sigma, shares_of(experiment), max(1, entries))


def trust_in_sum(privacy: PrivacyConfig, policy: Policy | None = None) -> str:
    """Return whom an epsilon takes to be honest where noise is in the sum; at a site whose
    ``policy`` takes the keys of the others from the server, that one as well, in this."""
    others = (
        f"all sites but {privacy.colluding}, which may pool what they know with the server; "
        f"at most {privacy.dropouts} fail in a round, or it is lost"
    )
    if policy is None or not policy.server_vouches_for_peers:
        return others
    return f"{others}; the server, which passes on the keys of sites, poses as none of them"
