"""``deal site check``: look at everything that can go wrong at a site, before it does."""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from client.site_file import SiteFile, read_site, site_files
from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment
from deal_core.data.files import FilesSource
from deal_core.data.identifiers import repeated_identifiers
from deal_core.data.source import TaskData, split_off_each
from deal_core.errors import UserError
from deal_core.privacy.policy import counts_in_sum
from simulations.check.findings import CLEAR_COUNTS
from simulations.check.rows import grouped
from simulations.deployment.keys import check_secret, fingerprint_of_private_key
from simulations.deployment.site.agreement import (
    Note,
    check_agreed,
    check_policy,
    check_secure_sums,
    check_sums,
    check_terms,
    check_unit,
    compare_labels,
    declared_labels,
    what_leaves,
)
from simulations.deployment.site.init import agreed_labels, host_and_port
from simulations.deployment.site.start import check_disjoint, make_private
from simulations.run.check import (
    alike_people_warning,
    both_sides_warning,
    identifier_warning,
)

CONNECT_SECONDS = 10.0
MOST_SKEW = 10.0
"""Seconds between two clocks: signatures of sign-in carry the time, and Flower refuses old ones."""


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


def label_of(line: str) -> str:
    """Return the word before a line."""
    return "note" if isinstance(line, Note) else "ok"


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
    report = Report([f"site '{site.site.name}', state in {site.site.state}"], [])
    agreed = agreed_labels(experiment) if experiment else {}
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: check_keys(site),
        lambda: check_state(site),
        lambda: check_secure_sums(site, experiment),
        lambda: check_disjoint(site),
        lambda: compare_labels(site, agreed) if experiment else declared_labels(site),
    ]
    if experiment is not None:
        checks.append(lambda: check_agreed(site, experiment))
        checks.append(lambda: check_policy(site, experiment))
        checks.append(lambda: check_sums(site, experiment))
        checks.append(lambda: check_unit(site, experiment))
        checks.append(lambda: check_terms(site, experiment))
    if not offline:
        checks.append(lambda: check_connection(site))
    for check in checks:
        _note(check, report)
    labels = agreed if experiment else site.data.labels
    unit_column = site.policy.unit_column if site.policy is not None else ""
    if site.policy is not None and site.policy.metrics == "clear":
        report.warnings.append(f"policy.{CLEAR_COUNTS}")
    data = site_files(site.data).model_copy(update={"labels": labels})
    summed = experiment is not None and counts_in_sum(experiment)
    check_data(data, report, unit_column, site.policy.min_records if site.policy and summed else 0)
    if not unit_column:
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
        if task.train:
            report.lines.extend(_described(task, report, least_tests))
    for name in known:
        if name not in names:
            sits_out = "this site sits it out, or under 'record' answers with noise alone"
            report.lines.append(Note(f"task '{name}': no folder; {sits_out}"))
    if known and not set(known) & set(names):
        report.problems.append(
            f"{config.path}: no folder is named like a task of the experiment "
            f"({', '.join(known)}); rename the folders"
        )


def _described(task: TaskData, report: Report, least_tests: int) -> Iterator[str]:
    report.warnings.extend((*both_sides_warning(task), *alike_people_warning(task)))
    if len(task.test) < least_tests:
        report.warnings.append(
            f"task '{task.name}': {len(task.test)} test rows, and counts go into a secure sum from "
            f"policy.min_records = {least_tests} on; this site sits the evaluations out"
        )
    yield from described(task)


def described(task: TaskData) -> list[str]:
    """Counts of a task; they are printed here and sent nowhere."""
    counts = Counter(example.label or "texts" for example in task.train)
    listed = ", ".join(f"{label} {count}" for label, count in sorted(counts.items()))
    groups = len({example.unit for example in task.train if example.unit})
    of_groups = f" of {groups} groups" if groups else ""
    return [
        f"task '{task.name}': {len(task.train)} train{of_groups}, {len(task.test)} test; "
        f"train: {listed}"
    ]


def check_connection(site: SiteFile) -> Iterator[str]:
    """Yield that the server answers, is the one that the certificate vouches for, and its clock.

    Raises:
        UserError: no connection, another server, or a clock that is too far off.
    """
    host, port = host_and_port(site.server.address, "server.address")
    if not Path(site.server.certificate).is_file():
        return
    try:
        context = ssl.create_default_context(cafile=site.server.certificate)
    except OSError:  # no certificate: what is wrong with it is told where keys are checked
        return
    connection = HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
    try:
        before = time.time()
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
        middle = (before + time.time()) / 2
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{site.server.address}: not the server that {site.server.certificate} vouches for "
            f"({error.verify_message}); compare ca.crt with the server's administrator"
        ) from None
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{site.server.address}: no connection ({error}); check address, firewall, and whether "
            "the server runs"
        ) from None
    finally:
        connection.close()
    yield f"server {site.server.address}: reached, certificate valid"
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


def _note(check: Callable[[], Iterator[str]], report: Report) -> None:
    try:
        report.lines.extend(check())
    except UserError as error:
        report.problems.append(str(error))
