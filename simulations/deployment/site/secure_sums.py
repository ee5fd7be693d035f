"""Whether secure sums could be made at a site: its pins, its policy, an experiment's wishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from client.site_file import SiteFile
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy
from deal_core.secure_sum.terms import LEAST_SITES
from simulations.deployment.site.note import Note
from simulations.deployment.site_keys import fingerprint_of_private_key

PINS = "write the fingerprints of the other sites' keys into [peers] of site.toml, by telephone"


def check_secure_sums(site: SiteFile, experiment: Experiment | None) -> Iterator[str]:
    """Yield one line: whether secure sums could be made here, with whom, and under which limits.

    Args:
        site: what the site has decided.
        experiment: None: none is asked about; then nothing is wrong with a site without pins.

    Raises:
        UserError: the experiment, or the policy, needs them, and they could not be made.
    """
    policy = site.policy or Policy()
    required = policy.secure_aggregation == "required"
    if required and experiment is not None and not experiment.aggregation.secure:
        raise UserError(
            "secure sums: the policy requires them, and aggregation.secure of the experiment is "
            "false, so this site takes no part; set it to true in the experiment"
        )
    asked = required or (experiment is not None and experiment.aggregation.secure)
    fault = _fault(site, policy, experiment)
    if fault and asked:
        raise UserError(f"secure sums: {fault}")
    if fault:
        yield Note(f"secure sums: not possible here: {fault}")
    else:
        word = "required" if required else "allowed"
        yield f"secure sums: {word} by the policy, {_with(site, policy)}"


def _fault(site: SiteFile, policy: Policy, experiment: Experiment | None) -> str:
    """Why there can be none; empty: there can."""
    others = set(site.peers.values()) - {_own(site)}
    if not site.peers:
        return "" if policy.server_vouches_for_peers else f"no site is pinned; {PINS}"
    least = max(LEAST_SITES, policy.min_cohort)
    if len(others) + 1 < least:
        return f"{len(others)} other sites are pinned, and a sum is of {least}; {PINS}"
    if experiment is None or not experiment.aggregation.secure:
        return ""
    if policy.min_cohort > experiment.aggregation.min_cohort:
        return (
            f"policy.min_cohort is {policy.min_cohort}, and aggregation.min_cohort of the "
            f"experiment {experiment.aggregation.min_cohort}; raise that, or lower the policy's"
        )
    if policy.colluding > experiment.privacy.colluding:
        return (
            f"policy.colluding is {policy.colluding}, and privacy.colluding of the experiment "
            f"{experiment.privacy.colluding}; raise that, or lower the policy's"
        )
    unpinned = set(experiment.federation.sites) - set(site.peers) - {site.site.name}
    if unpinned:
        return f"no key of {', '.join(sorted(unpinned))} is pinned; {PINS}"
    return ""


def _with(site: SiteFile, policy: Policy) -> str:
    least = max(LEAST_SITES, policy.min_cohort)
    limits = f"of {least} sites or more, {policy.colluding} of them working with the server"
    if not site.peers:
        return f"with whoever the server names (policy.server_vouches_for_peers), {limits}"
    return f"with {', '.join(sorted(site.peers))} (pinned), {limits}"


def _own(site: SiteFile) -> str:
    """The fingerprint of the site's own key; empty where it cannot be read, which is told apart."""
    try:
        return fingerprint_of_private_key(Path(site.server.key))
    except UserError:
        return ""
