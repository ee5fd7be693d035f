"""One thing that is wrong, or odd, with an experiment or its data; and how checks are run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError


@dataclass(frozen=True)
class Finding:
    """A line for people.

    Attributes:
        text: what is wrong, where, and the cure.
        kind: an ``error`` stops a run, a ``warning`` does not, a ``note`` is what was read.
    """

    text: str
    kind: Literal["error", "warning", "note"] = "error"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        find: raises a ``UserError`` of what is wrong, or gives findings.
        reads: tables of the experiment, or facts, that must be sound; else it is left out.
        settles: the fact that other checks rely on: an error here leaves them out.
    """

    find: Callable[[Experiment], Iterable[Finding] | None]
    reads: frozenset[str]
    settles: str = ""


def reading(*names: str) -> frozenset[str]:
    """Return the tables, and facts, that a check reads."""
    return frozenset(names)


def run_checks(
    checks: Iterable[Check], experiment: Experiment, unsound: Iterable[str] = ()
) -> Iterator[Finding]:
    """Yield what the checks find, each text once, as soon as it is found.

    Args:
        checks: in their order.
        experiment: with defaults in the place of what could not be read.
        unsound: tables that could not be read: checks of them are left out.
    """
    bad, told = set(unsound), set()
    for check in checks:
        if bad & check.reads:
            if check.settles:
                bad.add(check.settles)
            continue
        for finding in _found(check, experiment):
            if check.settles and finding.kind == "error":
                bad.add(check.settles)
            if finding not in told:
                told.add(finding)
                yield finding


def _found(check: Check, experiment: Experiment) -> Iterator[Finding]:
    try:
        yield from check.find(experiment) or ()
    except UserError as error:
        for problem in error.problems:
            yield Finding(problem)
