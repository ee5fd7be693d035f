"""``deal site check``: look at everything that can go wrong at a site, before it does; whether the
site takes part in an experiment, by its own ``site.toml``; and what would leave it."""

import json
import ssl
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from client.egress import FIELDS
from client.gate import Asked, Refusal, require
from client.identity import LOG
from client.site_file import SiteFile, read_site, site_files
from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment, counts_in_sum
from deal_core.data.files import FilesSource, SiteSource, repeated_identifiers
from deal_core.data.source import split_off_each
from deal_core.deal.interface import statistics_of
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.privacy.events import GROUP, RECORD, VERDICT, unit_text
from deal_core.privacy.policy import Policy, figures_allowed, protects, terms
from deal_core.secure_sum.terms import LEAST_SITES
from simulations.deployment import keys
from simulations.deployment.site import folder as site_folder
from simulations.run import quick_checks
from simulations.run.data_checks import label_counts, membership_text

MOST_SKEW = 10.0
"""Seconds between two clocks: signatures of sign-in carry the time, and Flower refuses old ones."""
PINS = "write the fingerprints of the other sites' keys into [peers] of site.toml, by telephone"


class Note(str):
    """A line about what does not take place here: ``note`` in the place of ``ok``."""


@dataclass(frozen=True)
class Report:
    """What was found, a line each."""

    lines: list[str] = field(default_factory=list)  # what is as it should be, and notes
    problems: list[str] = field(default_factory=list)  # what is wrong, where, and the cure
    warnings: list[str] = field(default_factory=list)  # what works, and may not be what is meant

    def printed(self) -> Iterator[str]:
        """Yield every line with the word before it."""
        for line in self.lines:
            yield f"{'note' if isinstance(line, Note) else 'ok':<7}{line}"
        yield from (f"warn   {line}" for line in self.warnings)
        yield from (f"wrong  {line}" for line in self.problems)


def check_site(folder: Path, experiment: Experiment | None = None, offline: bool = False) -> Report:
    """Check keys, data, connection and clock (``offline``: data and keys alone) of the folder of a
    site; the experiment's tasks, labels and base model are compared with the site's, and the data
    are read under them.

    Returns:
        What is as it should be, and what is wrong.

    Raises:
        UserError: ``site.toml`` cannot be used at all.
    """
    site = read_site(folder / "site.toml")
    policy = site.policy or Policy()
    report = Report([f"site '{site.site.name}', state in {site.site.state}"])
    labels = site.data.labels if experiment is None else site_folder.agreed_labels(experiment)
    checks = [check_keys(site), check_state(site), check_secure_sums(site, experiment)]
    checks += [site_folder.check_disjoint(site), check_labels(site, experiment)]
    if experiment is not None:
        checks += [each(site, experiment) for each in (check_agreed, check_policy, check_sums)]
    if not offline:
        checks.append(check_connection(site))
    for check in checks:
        try:
            report.lines.extend(check)
        except UserError as error:
            if str(error) not in report.problems:
                report.problems.append(str(error))
    if site.policy is not None and policy.metrics == "clear":
        report.warnings.append(f"policy.{quick_checks.CLEAR_COUNTS}")
    data = site_files(site.data).model_copy(update={"labels": labels})
    summed = site.policy is not None and experiment is not None and counts_in_sum(experiment)
    check_data(data, report, policy.unit_column, policy.min_records if summed else 0)
    if not policy.unit_column:
        found = repeated_identifiers(data)
        report.warnings.extend(
            quick_checks.identifier_warning(*each, "policy.unit_column") for each in found
        )
    report.lines.extend((*what_leaves(site), *last_verdict(site)))
    return report


def check_keys(site: SiteFile) -> Iterator[str]:
    """Of the private key and of the authority's certificate."""
    keys.check_secret(Path(site.server.key))
    yield f"key {site.server.key}: private"
    shown = keys.fingerprint_of_private_key(Path(site.server.key))
    yield f"fingerprint of this site's key, to be read out by telephone: {shown}"
    try:
        ssl.create_default_context(cafile=site.server.certificate)
    except (OSError, ssl.SSLError):
        raise UserError(
            f"{site.server.certificate}: no certificate; get ca.crt from the server's administrator"
        ) from None


def check_state(site: SiteFile) -> Iterator[str]:
    """Of the state folder."""
    state = Path(site.site.state)
    try:
        site_folder.make_private(state)
        probe = state / ".check"
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{state}: cannot be written ({error.strerror}); see site.state") from None
    yield f"state folder {state}: can be written"


def check_data(config: DataConfig, report: Report, unit_column: str, least_tests: int) -> None:
    """Read every task: lines with its counts, which are sent nowhere, and one for each kind of
    fault; a warning where a task has fewer than ``least_tests`` test rows."""
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
        report.problems.extend(quick_checks.grouped(map(str, problems)))
        if task.held_out:  # as the site divides them: no record moves another one
            train, test = split_off_each((*task.train, *task.test), config.split)
            task = replace(task, train=train, test=test)
        if task.left_out:
            report.warnings.append(
                f"task '{name}': {task.left_out} rows have no text or no answer, and are left out"
            )
        if not task.train:
            continue
        counts = Counter(example.label or "texts" for example in task.train)
        listed = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
        groups = len({example.unit for example in task.train if example.unit})
        report.lines.append(
            f"task '{name}': {len(task.train)} train{f' of {groups} groups' if groups else ''}, "
            f"{len(task.test)} test; train: {listed}"
        )
        report.warnings.extend(quick_checks.group_warnings(task))
        if len(task.test) < least_tests:
            report.warnings.append(
                f"task '{name}': {len(task.test)} test rows, and counts go into a secure sum from "
                f"policy.min_records = {least_tests} on; this site sits the evaluations out"
            )
    sits_out = "no folder; this site sits it out, or under 'record' answers with noise alone"
    report.lines.extend(Note(f"task '{n}': {sits_out}") for n in known if n not in names)
    if known and not set(known) & set(names):
        report.problems.append(
            f"{config.path}: no folder is named like a task of the experiment "
            f"({', '.join(known)}); rename the folders"
        )


def check_connection(site: SiteFile) -> Iterator[str]:
    """Of the server: it answers, its certificate is the authority's, its clock agrees."""
    end, skew = site_folder.reach(site)
    yield f"server {site.server.address}: reached, certificate valid"
    if said := keys.expiry(end):
        yield Note(f"server {site.server.address}: its certificate {said}")
    if skew is not None:
        yield from check_clock(skew)


def check_clock(skew: float) -> Iterator[str]:
    """Of the clocks, the server's being ``skew`` seconds ahead."""
    if abs(skew) > MOST_SKEW:
        word = "behind" if skew > 0 else "ahead of"
        raise UserError(
            f"the clock here is {abs(skew):.0f} s {word} the server's; sign-in would be refused: "
            "set both by NTP"
        )
    yield "clock: agrees with the server's"


def check_labels(site: SiteFile, experiment: Experiment | None) -> Iterator[str]:
    """Of tasks and labels; where they are missing or differ, the error has the lines to write."""
    own = site.data.labels
    if experiment is None:
        if not own:
            raise UserError(
                "[data.labels] of site.toml: not there, so this site takes part in no task; deal "
                "site check --experiment FILE prints the lines to add"
            )
        yield f"takes part in: {', '.join(own)}"
        return
    agreed = site_folder.agreed_labels(experiment)
    for task in own:
        if task not in agreed:
            yield f"task '{task}' of [data.labels]: not in this experiment"
        elif own[task] == agreed[task]:
            yield f"task '{task}': as agreed ({', '.join(own[task]) or 'answers are texts'})"
    differ = {task: labels for task, labels in agreed.items() if own.get(task) != labels}
    if differ:
        words = [f"'{task}' {'differs' if task in own else 'is missing'}" for task in differ]
        raise UserError(
            f"[data.labels] of site.toml: {', '.join(words)}; this site takes part in no such "
            "task. If the consortium has agreed on it, write there:\n"
            f"{'' if own else '[data.labels]' + chr(10)}{site_folder.label_lines(differ)}".rstrip()
        )


def check_agreed(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Of base model, public texts, and how each task is asked and answered."""
    asked = Asked(experiment, site.policy, site)
    require(asked, "model")
    agreed = site_folder.agreed_labels(experiment)
    if all(site.data.labels.get(task) == labels for task, labels in agreed.items()):
        require(asked, "data")  # else check_labels says so
    name = experiment.model.name
    place = Path(site.models[name] or name)
    if place.is_absolute() and not place.is_dir():
        raise UserError(
            f"[models] of site.toml: no folder {place}; write where the model lies here"
        )
    yield f"base model '{name}': agreed to"


def check_policy(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Of what the policy allows, the unit that is protected, and delta; not of secure sums."""
    require(Asked(experiment, site.policy), "policy", "sum", "unit")
    column = site.policy.unit_column if site.policy is not None else ""
    yield f"the policy allows the experiment: privacy.mechanism '{experiment.privacy.mechanism}'"
    if column:
        yield f"unit of privacy: {unit_text(GROUP, column)}, all records here with one value of it"
    if experiment.privacy.mechanism == "record":
        source = SiteSource(site_files(site.data), column)
        units = sum(source.load(task).units(bool(column)) for task in source.task_names())
        _, delta = terms(experiment.privacy, site.policy, units)
        unit = GROUP if column else RECORD
        yield f"delta = {delta:g} for {units} {unit}s: n delta = {units * delta:.2g}"


def check_sums(site: SiteFile, experiment: Experiment) -> Iterator[str]:
    """Of the class sums that the experiment asks for, and whether it can go without them."""
    statistics = statistics_of(method_of(experiment))
    if statistics is None:
        return
    try:
        require(Asked(experiment, site.policy, statistics=statistics), "class sums")
    except Refusal as refusal:
        if statistics.exact or not statistics.names:
            raise UserError(f"method.name '{experiment.method.name}': {refusal}") from None
        yield Note(f"class sums stay here, and its class means are those of other sites: {refusal}")
        return
    if protects(experiment.privacy, site.policy):
        yield "class sums leave under masks, with noise, charged"
    else:
        yield (
            "class sums leave under masks, once for each task, with a noise multiplier of "
            f"{statistics.noise_multiplier:g}"
        )
    source = SiteSource(site_files(site.data))
    tasks = source.task_names()
    if told := membership_text(experiment, label_counts(map(source.load, tasks)), len(tasks)):
        yield f"class sums of this site's records alone, {told}"


def check_secure_sums(site: SiteFile, experiment: Experiment | None) -> Iterator[str]:
    """Of secure sums: whether they could be made here, with whom, and under which limits."""
    policy = site.policy or Policy()
    required = policy.secure_aggregation == "required"
    if experiment is not None:
        require(Asked(experiment, site.policy), "masks")
    asked = experiment if experiment is not None and experiment.aggregation.secure else None
    least = max(LEAST_SITES, policy.min_cohort)
    fault = _no_sums(site, policy, least, asked)
    if fault and (asked or required):
        raise UserError(f"secure sums: {fault}")
    if fault:
        yield Note(f"secure sums: not possible here: {fault}")
        return
    named = "whoever the server names (policy.server_vouches_for_peers)"
    whom = f"{', '.join(sorted(site.peers))} (pinned)" if site.peers else named
    yield (
        f"secure sums: {'required' if required else 'allowed'} by the policy, with {whom}, of "
        f"{least} sites or more, {policy.colluding} of them working with the server"
    )


def _no_sums(site: SiteFile, policy: Policy, least: int, asked: Experiment | None) -> str:
    """Return why too few sites are pinned, or the sums that are asked for are none for this site;
    empty: they could be made."""
    if not site.peers:
        return "" if policy.server_vouches_for_peers else f"no site is pinned; {PINS}"
    own = ""
    with suppress(UserError):  # check_keys says so
        own = keys.fingerprint_of_private_key(Path(site.server.key))
    others = len(set(site.peers.values()) - {own})
    if others + 1 < least:
        return f"{others} other sites are pinned, and a sum is of {least}; {PINS}"
    if asked is None:
        return ""
    for key, wanted, place, theirs in (
        ("min_cohort", policy.min_cohort, "aggregation", asked.aggregation.min_cohort),
        ("colluding", policy.colluding, "privacy", asked.privacy.colluding),
    ):
        if wanted > theirs:
            return (
                f"policy.{key} is {wanted}, and {place}.{key} of the experiment {theirs}; raise "
                "that, or lower the policy's"
            )
    unpinned = set(asked.federation.sites) - set(site.peers) - {site.site.name}
    return f"no key of {', '.join(sorted(unpinned))} is pinned; {PINS}" if unpinned else ""


def last_verdict(site: SiteFile) -> Iterator[str]:
    """What the site has said of class means last, by its log."""
    log, told = Path(site.site.state) / LOG, []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        with suppress(ValueError):  # a full disk leaves half a line
            event = json.loads(line)
            told += [event] if event["event"] == VERDICT else []
    for last in told[-1:]:
        word = "worse" if last["worse"] else "not worse"
        tasks = ", ".join(last["tasks"])
        yield Note(f"last said of class means, of {tasks}: they make answers here {word}")


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
    private = figures_allowed(dict.fromkeys(charged, 0.0), policy)
    counts = {
        "clear": "as they are",
        "none": "stay here",
        "summed": "as part of a secure sum alone",
    }
    own = counts[policy.metrics if policy is not None else "clear"]
    sums = "with noise, charged" if protected else "none leaves"
    if not protected and (policy is None or policy.share_sums):
        sums = "with noise, once for each task"
    bit = "stays here" if protected or (policy and not policy.share_sums) else "leaves"
    masked = {} if protected else figures_allowed(ordinary, policy, masked=True)
    loss = " and the mean loss" if "loss" in masked else ""
    least = max(LEAST_SITES, policy.min_cohort) if policy is not None else LEAST_SITES
    return [
        f"would leave: LoRA factors of {', '.join(site.models)}{noised}",
        f"would leave with them: {', '.join(figures)}; in a run with differential privacy also "
        f"{', '.join(name for name in charged if name in private)}",
        f"right answers (correct, correct_all, examples) for each task: {own}",
        "class sums (of each label a count and a sum of vectors), where a method "
        f"is made of them, under masks and with noise: {sums}",
        "one bit for each stage with new class means, whether they make answers on records that "
        f"are held back worse: {bit}",
        f"in a secure sum: keys, shares and, in the place of the factors, masked ones{loss}: what "
        f"can be read is their sum over {least} sites or more",
        f"with every reply: {', '.join(FIELDS['status'])}; no text, no path, no column, no message "
        "of an error",
    ]
