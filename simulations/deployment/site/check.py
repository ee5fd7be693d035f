"""``deal site check``: look at everything that can go wrong at a site, before it does; whether the
site takes part in an experiment, by its own ``site.toml``; and what would leave it."""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from client.egress import FIELDS
from client.gate import Asked, require
from client.site_file import SiteFile, read_site, site_files
from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment, counts_in_sum
from deal_core.data.files import FilesSource, SiteSource
from deal_core.data.identifiers import repeated_identifiers
from deal_core.data.source import TaskData, split_off_each
from deal_core.errors import UserError
from deal_core.methods import method_of, statistics_of
from deal_core.privacy.events import GROUP, RECORD, unit_text
from deal_core.privacy.policy import (
    Policy,
    figures_allowed,
    protects,
    terms,
)
from deal_core.secure_sum.terms import LEAST_SITES
from simulations.deployment.keys import check_secret, fingerprint_of_private_key
from simulations.deployment.site.folder import (
    agreed_labels,
    check_disjoint,
    host_and_port,
    label_lines,
    make_private,
)
from simulations.run.quick_checks import (
    CLEAR_COUNTS,
    alike_people_warning,
    both_sides_warning,
    grouped,
    identifier_warning,
)

CONNECT_SECONDS = 10.0
MOST_SKEW = 10.0
"""Seconds between two clocks: signatures of sign-in carry the time, and Flower refuses old ones."""


class Note(str):
    """It is printed with ``note``, where a line that is as it should be is printed with ``ok``."""

    __slots__ = ()


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        lines: what is as it should be; a :class:`Note` where something does not take place here.
        problems: one line each: what is wrong, where, and the cure.
        warnings: one line each: what works, and may not be what is meant.
    """

    lines: list[str]
    problems: list[str]
    warnings: list[str] = field(default_factory=list)

    def printed(self) -> Iterator[str]:
        """Yield every line with the word before it."""
        for line in self.lines:
            yield f"{'note' if isinstance(line, Note) else 'ok':<7}{line}"
        yield from (f"warn   {line}" for line in self.warnings)
        yield from (f"wrong  {line}" for line in self.problems)


def check_site(folder: Path, experiment: Experiment | None = None, offline: bool = False) -> Report:
    """Check keys, data, connection and clock.

    Args:
        folder: of ``deal site init``.
        experiment: its tasks, labels and base model are compared with the site's; the data are read
            under them.
        offline: leave connection and clock out.

    Returns:
        What is as it should be, and what is wrong.

    Raises:
        UserError: ``site.toml`` cannot be used at all.
    """
    site = read_site(folder / "site.toml")
    policy = site.policy or Policy()
    report = Report([f"site '{site.site.name}', state in {site.site.state}"], [])
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: check_keys(site),
        lambda: check_state(site),
        lambda: check_secure_sums(site, experiment),
        lambda: check_disjoint(site),
    ]
    labels = site.data.labels
    if experiment is None:
        checks.append(lambda: require_labels(site))
    else:
        labels = agreed_labels(experiment)
        compare = (compare_labels, check_agreed, check_policy, check_sums, check_terms)
        checks += [partial(each, site, experiment) for each in compare]
    if not offline:
        checks.append(lambda: check_connection(site))
    for check in checks:
        try:
            report.lines.extend(check())
        except UserError as error:
            report.problems.append(str(error))
    if site.policy is not None and policy.metrics == "clear":
        report.warnings.append(f"policy.{CLEAR_COUNTS}")
    data = site_files(site.data).model_copy(update={"labels": labels})
    summed = experiment is not None and counts_in_sum(experiment)
    least_tests = policy.min_records if site.policy is not None and summed else 0
    check_data(data, report, policy.unit_column, least_tests)
    if not policy.unit_column:
        found = repeated_identifiers(data)
        report.warnings.extend(identifier_warning(each, "policy.unit_column") for each in found)
    report.lines.extend(what_leaves(site))
    return report


def check_keys(site: SiteFile) -> Iterator[str]:
    """Yield what was found of the private key and of the authority's certificate.

    Raises:
        UserError: one is missing, or the key is readable for others.
    """
    check_secret(Path(site.server.key))
    yield f"key {site.server.key}: private"
    shown = fingerprint_of_private_key(Path(site.server.key))
    yield f"fingerprint of this site's key, to be read out by telephone: {shown}"
    try:
        ssl.create_default_context(cafile=site.server.certificate)
    except (OSError, ssl.SSLError):
        raise UserError(
            f"{site.server.certificate}: no certificate; get ca.crt from the server's administrator"
        ) from None


def check_state(site: SiteFile) -> Iterator[str]:
    """Yield that the state folder can be written.

    Raises:
        UserError: it cannot.
    """
    state = Path(site.site.state)
    try:
        make_private(state)
        probe = state / ".check"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{state}: cannot be written ({error.strerror}); see site.state") from None
    yield f"state folder {state}: can be written"


def check_data(
    config: DataConfig, report: Report, unit_column: str = "", least_tests: int = 0
) -> None:
    """Read every task; one line for each, and one for each kind of fault.

    Args:
        config: the site's files.
        report: gets the lines.
        unit_column: of the policy: every row should have a value in it.
        least_tests: fewest test rows of a task that is counted in a secure sum.
    """
    source = FilesSource(config, unit_column)
    try:
        names = source.task_names()
    except UserError as error:
        report.problems.append(str(error))
        return
    known = config.labels
    for name in names:
        if known and name not in known:
            stays_out = f"task '{name}': a folder, but no task agreed on; it stays out"
            report.lines.append(Note(stays_out))
            continue
        task, problems = source.examine(name)
        report.problems.extend(grouped(map(str, problems)))
        if task.held_out:  # as the site divides them: no record moves another one
            train, test = split_off_each((*task.train, *task.test), config.split)
            task = replace(task, train=train, test=test)
        if not task.train:
            continue
        report.lines.append(described(task))
        report.warnings.extend((*both_sides_warning(task), *alike_people_warning(task)))
        if len(task.test) < least_tests:
            report.warnings.append(
                f"task '{name}': {len(task.test)} test rows, and counts go into a secure sum from "
                f"policy.min_records = {least_tests} on; this site sits the evaluations out"
            )
    for name in known:
        if name not in names:
            sits_out = "this site sits it out, or under 'record' answers with noise alone"
            report.lines.append(Note(f"task '{name}': no folder; {sits_out}"))
    if known and not set(known) & set(names):
        report.problems.append(
            f"{config.path}: no folder is named like a task of the experiment "
            f"({', '.join(known)}); rename the folders"
        )


def described(task: TaskData) -> str:
    """Counts of a task; they are printed here and sent nowhere."""
    counts = Counter(example.label or "texts" for example in task.train)
    listed = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
    groups = len({example.unit for example in task.train if example.unit})
    of_groups = f" of {groups} groups" if groups else ""
    return (
        f"task '{task.name}': {len(task.train)} train{of_groups}, {len(task.test)} test; "
        f"train: {listed}"
    )


def check_connection(site: SiteFile) -> Iterator[str]:
    """Yield that the server answers, is the one that the certificate vouches for, and its clock.

    Raises:
        UserError: no connection, another server, or a clock that is too far off.
    """
    address, certificate = site.server.address, site.server.certificate
    host, port = host_and_port(address, "server.address")
    try:
        context = ssl.create_default_context(cafile=certificate)
    except OSError:  # what is wrong with it is told where keys are checked
        return
    connection = HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
    try:
        before = time.time()
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
        middle = (before + time.time()) / 2
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{address}: not the server that {certificate} vouches for ({error.verify_message}); "
            "compare ca.crt with the server's administrator"
        ) from None
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{address}: no connection ({error}); check address, firewall, and whether the server "
            "runs"
        ) from None
    finally:
        connection.close()
    yield f"server {address}: reached, certificate valid"
    if date:
        yield from check_clock(parsedate_to_datetime(date).timestamp() + 0.5 - middle)


def check_clock(skew: float) -> Iterator[str]:
    """Yield that the clocks agree.

    Args:
        skew: seconds by which the server's clock is ahead.

    Raises:
        UserError: they differ by more than ``MOST_SKEW``.
    """
    if abs(skew) > MOST_SKEW:
        word = "behind" if skew > 0 else "ahead of"
        raise UserError(
            f"the clock here is {abs(skew):.0f} s {word} the server's; sign-in would be refused: "
            "set both by NTP"
        )
    yield "clock: agrees with the server's"


PINS = "write the fingerprints of the other sites' keys into [peers] of site.toml, by telephone"


def compare_labels(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield a line for each task on which both agree, or that is the site's alone.

    Raises:
        UserError: labels are missing or differ; the lines to be written stand in it.
    """
    own, agreed = site.data.labels, agreed_labels(experiment)
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


def require_labels(site: SiteFile) -> Iterator[str]:
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
    require(Asked(experiment, site.policy, site), "model")
    place = Path(site.models[experiment.model.name] or experiment.model.name)
    agreed, own = agreed_labels(experiment), site.data.labels
    if all(own.get(task) == labels for task, labels in agreed.items()):  # else that is told
        require(Asked(experiment, site.policy, site), "data")
    if place.is_absolute() and not place.is_dir():
        raise UserError(
            f"[models] of site.toml: no folder {place}; write where the model lies here"
        )
    yield f"base model '{experiment.model.name}': agreed to"


def check_policy(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Yield that the policy allows what the experiment asks, and what is protected; secure sums
    have a check of their own.

    Raises:
        UserError: the site would take no part in it.
    """
    require(Asked(experiment, site.policy), "policy", "sum", "unit")
    column = site.policy.unit_column if site.policy is not None else ""
    yield f"the policy allows the experiment: privacy.mechanism '{experiment.privacy.mechanism}'"
    if column:
        yield f"unit of privacy: {unit_text(GROUP, column)}, all records here with one value of it"


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
    try:
        own = fingerprint_of_private_key(Path(site.server.key))
    except UserError:  # told where keys are checked
        own = ""
    others = set(site.peers.values()) - {own}
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
