"""``deal check``: all that is wrong, or odd, with an experiment and its data; nothing starts. Each
check in words: docs/checking.md."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console

from deal_core.config.experiment import Experiment, show_device
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.errors import UserError
from deal_core.installed import without_collection
from simulations.output import at_work, print_line
from simulations.run.experiment import find_experiment, own_folder, with_absolute_inputs
from simulations.run.quick_checks import QUICK, Check, Finding, check_rows, warning

FAILED = 2

Say = Callable[[str], None]
"""Told what is checked next, where it takes its time."""


def check(name: str, overrides: tuple[str, ...], strict: bool, console: Console) -> int:
    """Print every finding as soon as it is there, and how many there are.

    Args:
        name: a shipped experiment or the path of a TOML file.
        overrides: ``table.key=value``, applied in order.
        strict: warnings count as errors.
        console: for people.

    Returns:
        The exit code: 0, or 2 where something is wrong.

    Raises:
        UserError: there is no such experiment, or its file is no TOML.
    """
    counts: Counter[str] = Counter()
    with at_work(console, "checking the experiment") as say:
        for finding in findings(name, overrides, say):
            counts[finding.kind] += 1
            kind = "" if finding.kind == "note" else f"{finding.kind}: "
            print_line(console, f"{kind}{finding.text}")
    errors, warnings = counts["error"], counts["warning"]
    if errors or warnings:
        print_line(console, f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}")
    else:
        print_line(console, "nothing is wrong")
    return FAILED if errors or (strict and warnings) else 0


def _counted(count: int, word: str) -> str:
    """Return ``1 error``, ``2 errors``, ``no errors``."""
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"


def findings(
    name: str, overrides: tuple[str, ...], say: Say = lambda what: None
) -> Iterator[Finding]:
    """Yield what is wrong with an experiment: its keys, or else all the rest.

    Raises:
        UserError: there is no such experiment, its file is no TOML, or an override is none.
    """
    path = find_experiment(name)
    tables = read_toml(path)
    changed = apply_overrides(tables, overrides)
    try:
        parse_experiment(tables, str(path))
        experiment = parse_experiment(changed, "--set")
    except UserError as error:
        yield from map(Finding, error.problems)
        return
    show_device(experiment.run.device)
    if not tables:
        yield warning(f"{path}: is empty, so it is what all keys are by default: MedMCQA, embedded")
    experiment = with_absolute_inputs(experiment, own_folder(name, path))
    if experiment.data.source == "sites":
        yield warning('data.source = "sites": rows are read by deal site check')
    right = True
    for finding in run_checks(experiment, experiment.data.source != "sites", say):
        right = right and finding.kind != "error"
        yield finding
    if right and experiment.data.source != "sites":
        say("estimating memory and time")
        from simulations.run.needs import check_needs  # with torch

        yield from check_needs(experiment)


def run_checks(
    experiment: Experiment, with_rows: bool = True, say: Say = lambda what: None
) -> Iterator[Finding]:
    """Yield each finding once, as soon as it is there. torch is imported when the quick checks are
    through; what takes longer is left out where something is wrong by then."""
    found: dict[Finding, None] = {}

    def new(checks: Iterable[Check]) -> Iterator[Finding]:
        for check in checks:
            if check in told:
                say(told[check])
            for finding in _findings_of(check, experiment):
                if finding not in found:
                    found[finding] = None
                    yield finding

    told: dict[Check, str] = {check_rows: "reading the data"}
    yield from new((check_rows, *QUICK) if with_rows else QUICK)
    say("loading PyTorch")
    with without_collection():
        from simulations.run.data_checks import check_data, check_membership, check_text_lengths
        from simulations.run.model_checks import NAMES, check_model
    told |= {
        NAMES[0]: "checking what goes together",
        check_data: "reading and dividing the data",
        check_model: "building the model",
        check_text_lengths: "counting tokens",
    }
    yield from new(NAMES)
    if all(finding.kind != "error" for finding in found):
        longer = (check_data, check_model, check_text_lengths, check_membership)
        yield from new(longer if with_rows else (check_model,))


def _findings_of(check: Check, experiment: Experiment) -> Iterator[Finding]:
    try:
        yield from check(experiment) or ()
    except UserError as error:
        yield from map(Finding, error.problems)


def preflight(
    experiment: Experiment,
    warn: Callable[[str], None] = lambda line: None,
    say: Say = lambda what: None,
) -> None:
    """Make the checks of :func:`run_checks` before a run starts; ``warn`` hears of every warning,
    also where something is wrong.

    Raises:
        UserError: all that is wrong, a line each with the place and the cure.
    """
    errors = []
    for finding in run_checks(experiment, say=say):
        if finding.kind == "warning":
            warn(finding.text)
        elif finding.kind == "error":
            errors.append(finding.text)
    if errors:
        raise UserError(*errors)
