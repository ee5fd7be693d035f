"""Whether a site takes part in an experiment, by its own ``site.toml``: tasks and labels, base
model, policy, class sums, secure sums; and what would leave it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from client.egress import FIELDS
from client.site_file import SiteFile, agreed_model, own_data, site_files
from deal_core.config.experiment import Experiment
from deal_core.data.files import SiteSource
from deal_core.errors import UserError
from deal_core.methods import method_of, statistics_of
from deal_core.privacy.events import GROUP, RECORD, unit_text
from deal_core.privacy.policy import (
    Policy,
    figures_allowed,
    protects,
    require_adapter,
    require_comparable,
    require_mechanism,
    require_shares,
    require_unit,
    terms,
)
from deal_core.secure_sum.terms import LEAST_SITES
from simulations.deployment.keys import fingerprint_of_private_key
from simulations.deployment.site.init import agreed_labels, label_lines

PINS = "write the fingerprints of the other sites' keys into [peers] of site.toml, by telephone"
Labels = Mapping[str, tuple[str, ...]]


class Note(str):
    """It is printed with ``note``, where a line that is as it should be is printed with ``ok``."""

    __slots__ = ()


def compare_labels(site: SiteFile, agreed: Labels) -> Iterator[str]:
    """Yield a line for each task on which both agree, or that is the site's alone.

    Raises:
        UserError: labels are missing or differ; the lines to be written stand in it.
    """
    own = site.data.labels
    for task in own:
        if task not in agreed:
            yield f"task '{task}' of [data.labels]: not in this experiment"
        elif own[task] == agreed[task]:
            shown = (
                f"labels as agreed ({', '.join(own[task])})" if own[task] else "answers are texts"
            )
            yield f"task '{task}': {shown}"
    differ = {task: labels for task, labels in agreed.items() if own.get(task) != labels}
    if not differ:
        return
    words = [f"'{task}' {'differs' if task in own else 'is missing'}" for task in differ]
    raise UserError(
        f"[data.labels] of site.toml: {', '.join(words)}; this site takes part in no such task. "
        "If the consortium has agreed on it, write there:\n"
        f"{'' if own else '[data.labels]' + chr(10)}{label_lines(differ)}".rstrip()
    )


def declared_labels(site: SiteFile) -> Iterator[str]:
    """Yield a line with the tasks that the site takes part in.

    Raises:
        UserError: there is none.
    """
    if not site.data.labels:
        raise UserError(
            "[data.labels] of site.toml: not there, so this site takes part in no task; deal site "
            "check --experiment FILE prints the lines to add"
        )
    yield f"takes part in: {', '.join(site.data.labels)}"


def check_agreed(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield that base model and public texts of the experiment are among those of the site.

    Raises:
        UserError: the site has not agreed to one of them, or to how a task is asked and answered;
            or the model's folder is not there.
    """
    place = Path(agreed_model(experiment, site).name)
    agreed, own = agreed_labels(experiment), site.data.labels
    if all(own.get(task) == labels for task, labels in agreed.items()):  # else that is told
        own_data(experiment.data, site.data)
    if place.is_absolute() and not place.is_dir():
        raise UserError(
            f"[models] of site.toml: no folder {place}; write where the model lies here"
        )
    yield f"base model '{experiment.model.name}': agreed to"


def check_policy(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield that the policy allows what the experiment asks; secure sums have a check of their own.

    Raises:
        UserError: the site would take no part in it.
    """
    require_mechanism(experiment.privacy.mechanism, site.policy)
    require_adapter(experiment.adapter, site.policy)
    require_shares(experiment.privacy, site.policy)
    require_comparable(experiment, site.policy)
    yield f"the policy allows the experiment: privacy.mechanism '{experiment.privacy.mechanism}'"


def check_sums(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield what becomes of the class sums that the experiment asks for, if it does.

    Raises:
        UserError: they are exact, or nothing can be learnt without them and the policy keeps them.
    """
    statistics = statistics_of(method_of(experiment))
    if statistics is None:
        return
    name = experiment.method.name
    if statistics.exact is not None:
        raise UserError(
            f"method.name '{name}' asks for exact sums, which tell who is in them; no site gives "
            "any: take another method"
        )
    if protects(experiment.privacy, site.policy):
        yield "the experiment asks for class sums: they leave under masks, with noise, charged"
    elif site.policy is None or site.policy.share_sums:
        yield (
            "the experiment asks for class sums: they leave under masks, once for each task, with "
            f"a noise multiplier of {statistics.noise_multiplier:g}"
        )
    elif statistics.names:
        yield Note(
            "the experiment asks for class sums: they stay here (policy.share_sums), and its class "
            "means are those of other sites"
        )
    else:
        raise UserError(
            f"method.name '{name}' is made of class sums, and the policy keeps them: set "
            "policy.share_sums to true in site.toml, or take no part"
        )


def check_unit(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield what the experiment protects here: single records, or groups.

    Raises:
        OutsidePolicy: the policy demands the other.
    """
    column = require_unit(experiment.privacy.unit_column, site.policy)
    if column:
        yield f"unit of privacy: {unit_text(GROUP, column)}, all records here with one value of it"


def check_terms(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield the delta that records, or groups, are protected at, and what it comes to.

    Raises:
        UserError: the policy does not allow the clipping bound, or delta is too large for the
            number of records.
    """
    if experiment.privacy.mechanism != "record":
        return
    column = site.policy.unit_column if site.policy is not None else ""
    source = SiteSource(site_files(site.data), column)
    units = sum(source.load(task).units(bool(column)) for task in source.task_names())
    delta = terms(experiment.privacy, site.policy, units).delta
    unit = GROUP if column else RECORD
    yield f"delta = {delta:g} for {units} {unit}s: n delta = {units * delta:.2g}"


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


def what_leaves(site: SiteFile) -> list[str]:
    """Everything that a reply may hold under the site's policy."""
    policy = site.policy
    protected = policy is not None and policy.demanded == "record"
    noised = ", clipped, noised and charged to the ledger" if protected else ""
    ordinary = dict.fromkeys(("num_examples", "loss", "seconds"), 0.0)
    figures = ["num_examples"] if protected else list(figures_allowed(ordinary, policy))
    if policy is not None and (protected or not policy.share_num_examples):
        figures[figures.index("num_examples")] = "num_examples (always 1)"
    charged = ["simulation_only", "epsilon", "delta", "n_delta", "void", "assumes_more"]
    charged += ["disjoint_tasks"] if policy is not None and policy.disjoint_tasks else []
    allowed = figures_allowed(dict.fromkeys(charged, 0.0), policy)
    private = [name for name in charged if name in allowed]
    summed = _sums(policy, protected)
    counts = {"clear": "as they are", "noised": "with noise, charged", "none": "stay here"}
    counts["summed"] = "as part of a secure sum alone"
    own = counts[policy.metrics if policy is not None else "clear"]
    masked = {} if protected else figures_allowed(ordinary, policy, masked=True)
    loss = " and the mean loss" if "loss" in masked else ""
    least = max(LEAST_SITES, policy.min_cohort) if policy is not None else LEAST_SITES
    return [
        f"would leave: LoRA factors of {', '.join(site.models)}{noised}",
        f"would leave with them: {', '.join(figures)}; in a run with differential privacy also "
        f"{', '.join(private)}",
        f"right answers (correct, correct_all, examples) for each task: {own}",
        "class sums (of each label a count and a sum of vectors), where a method "
        f"is made of them, under masks and with noise: {summed}",
        f"in a secure sum: keys, shares and, in the place of the factors, masked ones{loss}: what "
        f"can be read is their sum over {least} sites or more",
        f"with every reply: {', '.join(FIELDS['status'])}; no text, no path, no column, no message "
        "of an error",
    ]


def _sums(policy: Policy | None, protected: bool) -> str:
    """How class sums leave."""
    if protected:
        return "with noise, charged"
    if policy is None or policy.share_sums:
        return "with noise, once for each task"
    return "none leaves"
