"""What a check has found, and what is odd in settings: a line with place and cure each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.config.privacy import PrivacyConfig
from deal_core.data import open_source
from deal_core.errors import UserError, nearest


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


BY_TASK = ("labels", "generation", "measures", "instructions", "files")


def check_task_names(experiment: Experiment) -> Iterator[Finding]:
    """Yield a warning for each name that the source has no task of: what is set for it is not used.

    Raises:
        UserError: the source cannot be opened.
    """
    data = experiment.data
    known = open_source(data.model_copy(update={"tasks": ()})).task_names()
    for table in BY_TASK:
        for name in getattr(data, table):
            if name not in known:
                text = f"data.{table}: there is no task '{name}'{nearest(name, known)}"
                yield Finding(f"{text}; what is set for it is not used", kind="warning")


LARGEST_RATE = 0.1
"""Of AdamW: above, training diverges."""
LARGEST_EPSILON = 20.0
LEAST_REACH = 1.0
"""Of steps at the server on sums of clipped gradients: rate, rounds, bound and scale together."""
TRAINED_AT_SERVER = ("deal", "sequential")


BUDGET = ("target_epsilon", "target_delta", "unit_column")
"""Keys of ``privacy`` that say nothing without a mechanism."""


def check_training(experiment: Experiment) -> Iterator[Finding]:
    """Return warnings of rates and ranks."""
    return _warnings(_training(experiment))


def check_privacy(experiment: Experiment) -> Iterator[Finding]:
    """Return warnings of a budget that says nothing."""
    return _warnings(_privacy(experiment))


def _warnings(lines: Iterator[str]) -> Iterator[Finding]:
    return (Finding(line, kind="warning") for line in lines)


def _training(experiment: Experiment) -> Iterator[str]:
    train, federation, adapter = experiment.train, experiment.federation, experiment.adapter
    if train.step == "client" and train.learning_rate > LARGEST_RATE:
        yield (
            f"train.learning_rate = {train.learning_rate:g} is large for AdamW, and diverges; "
            "usual are 0.0001 to 0.01"
        )
    steps = train.step == "server" and experiment.method.name in TRAINED_AT_SERVER
    scale = adapter.lora_alpha / adapter.rank
    reach = train.learning_rate * federation.rounds * experiment.privacy.max_grad_norm * scale
    if steps and reach < LEAST_REACH:
        yield (
            f"train.learning_rate = {train.learning_rate:g} is of AdamW; the server takes plain "
            f"steps, which together move the adapter by {reach:.2g} at most, and hardly anything "
            "is learnt; usual are 0.5 to 8"
        )
    if federation.clients_per_round > federation.clients:
        yield (
            f"federation.clients_per_round = {federation.clients_per_round} is more than "
            f"federation.clients = {federation.clients}: all are asked"
        )
    method = experiment.method
    retains = method.name == "deal" and method.retention.filter != "none"
    if retains and adapter.retained_rank < adapter.rank:
        yield (
            f"adapter.retained_rank = {adapter.retained_rank} is below adapter.rank = "
            f"{adapter.rank}: not even one task is kept whole"
        )


def _default(key: str) -> object:
    return PrivacyConfig.model_fields[key].default


CLEAR_COUNTS = (
    'metrics = "clear": a crafted head or adapter can name test records by their counts (4 of 4 by '
    'two requests); set it to "summed", "noised" or "none" to hide them'
)


def _privacy(experiment: Experiment) -> Iterator[str]:
    privacy = experiment.privacy
    said = "metrics" in privacy.model_fields_set and privacy.metrics == "clear"
    if said and experiment.data.source == "sites":
        yield f"privacy.{CLEAR_COUNTS}"
    if privacy.mechanism == "none":
        unused = [key for key in BUDGET if getattr(privacy, key) != _default(key)]
        if unused:
            yield (
                f'privacy.{unused[0]} is set, and privacy.mechanism = "none" protects nothing; set '
                'privacy.mechanism to "record", or leave it out'
            )
        return
    if privacy.target_epsilon > LARGEST_EPSILON:
        yield (
            f"privacy.target_epsilon = {privacy.target_epsilon:g} is above {LARGEST_EPSILON:g}: it "
            "promises next to nothing; usual are 1 to 8"
        )
