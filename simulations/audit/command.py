"""``deal audit``: attack a mechanism under several budgets, and say what is shown: ``audit.json``,
what was claimed and, beside it, what the attacks refute."""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from rich.console import Console

from deal_core.config.experiment import Experiment, at_server
from deal_core.data import open_source, public_labels
from deal_core.errors import UserError, at_home
from deal_core.models import embedding_size
from deal_core.privacy.events import unit_text
from server.results import Strict, rounded_up
from simulations import output
from simulations.audit.canaries import GradientCanaries
from simulations.audit.claim import SIGNIFICANCE, LowerBound, claim_p_value, lower_bound
from simulations.audit.run import Found, carry_out
from simulations.engines import STOPPED, stoppable
from simulations.run.check import preflight
from simulations.run.experiment import Request, epsilons, load_experiment, named, with_budget
from simulations.run.run_log import told_to

REFUTED = 1
"""Exit code where a claim has been shown to be wrong."""


EXPLANATION = (
    "'Claim': epsilon that the ledger holds. 'At least': lower bound on epsilon, if the mechanism "
    "is the claimed one but for its noise. 'p': probability, at most, of guesses as right as "
    "these if the ledger is true; below 0.05 the claim is refuted. 'Refuted noise': the least, in "
    "units of the claimed noise, that is refuted; the bound is its epsilon. Bounds hold with 95 % "
    "confidence, each by itself; one below the claim proves nothing."
)
STEPS = (
    "Canaries: records (where groups are protected, groups of records) whose gradient is 100 times "
    "as long as the bound, sampled, clipped and noised by the mechanism itself; the attacker sees "
    "every noised gradient."
)
SUMS = (
    "Canaries: records (or groups) of one site whose gradient is 100 times as long as the bound. "
    "The attacker is the server with as many other sites as the noise is planned against, and as "
    "many more have failed as may: every sum over the others is seen."
)
NOBODY_ELSE = "against everybody but the site itself, the server included"
"""Whom a claim takes to be honest, where the noise is all the site's own."""


def run_audit(
    name: str,
    folder: Path,
    console: Console,
    *,
    epsilon: str = "1,8",
    overrides: Sequence[str] = (),
    client: int = 0,
    canaries: int = 2000,
    seed: int = 0,
    repetitions: int = 8,
    records: int = 32,
) -> int:
    """Train an experiment with canaries, and report into a folder; the help of the command says
    what its options are.

    Returns:
        The exit code: 0; 1 where a claim is refuted; 130 where it was stopped.

    Raises:
        UserError: bad input; nothing has started.
    """
    output.require_one_kind(folder, "audit.json")
    base = load_experiment(Request(name, str(folder), tuple(overrides)))
    budgets = epsilons(epsilon)
    _check(name, base, client, budgets)
    room = _with_room(base, canaries)
    with output.at_work(console, "checking the experiment") as say:
        preflight(with_budget(base, budgets[0]), say=say)
    found: dict[float, list[Found]] = {}
    stops = stoppable("the training at work ends, and nothing is kept")
    try:
        with stops, output.at_work(console, "starting") as say:
            for budget, repeat in product(budgets, range(repetitions)):
                output.print_line(console, f"epsilon {named(budget)}, {repeat + 1}")
                own, hear = GradientCanaries(room, seed, repeat), told_to(console, say)
                one = carry_out(with_budget(base, budget), client, own, records, hear)
                found.setdefault(budget, []).append(one)
    except KeyboardInterrupt:
        output.print_line(console, "stopped; nothing is kept")
        return STOPPED
    with output.at_work(console, "judging"):
        cells = [
            AuditedCell(
                epsilon=named(budget),
                p_value=claim_p_value(trainings),
                bound=lower_bound(trainings, trainings[0].delta),
                trainings=trainings,
            )
            for budget, trainings in found.items()
        ]
        audit = Audit(experiment=Path(name).stem, cells=cells)
    output.write_texts(folder, {"audit.json": audit.model_dump_json(indent=1) + "\n"})
    output.print_table(console, attack_table(audit))
    first = audit.cells[0].trainings[0]
    output.print_line(console, claims(first))
    if first.simulation_only:
        output.print_line(console, "Simulation only: the noise came from a seed.")
    output.print_line(
        console, f"figures in {folder / 'audit.json'}; report.html says how to read them"
    )
    return REFUTED if any(cell.refuted for cell in audit.cells) else 0


def audit_folder(kind: str, name: str, out: str) -> Path:
    """Return the folder of an audit's figures; ``kind`` names it where ``out`` does not."""
    return at_home(out or f"runs/{kind}-{Path(name).stem}").resolve()


def _with_room(experiment: Experiment, canaries: int) -> int:
    """Return as many canaries as asked for, or as many as share no entry in the smallest task.

    A pooled adapter learns a row less than a task has labels; two entries are a canary's. Of other
    kinds there is room for thousands, and too many are refused where they are planted.
    """
    if experiment.adapter.kind != "pooled":
        return canaries
    tasks = open_source(experiment.data).task_names()
    rows = min(len(public_labels(experiment.data, task)) - 1 for task in tasks)
    size = embedding_size(experiment.model)
    return max(2, min(canaries, min(rows, experiment.adapter.rank) * size // 2))


def _check(name: str, base: Experiment, client: int, budgets: Sequence[float]) -> None:
    if math.inf in budgets:
        raise UserError(
            "--epsilon inf: without privacy there is no claim to test; "
            f"deal audit {name} --membership tells who can be found"
        )
    if not 0 <= client < base.federation.clients:
        raise UserError(
            f"--client {client}: the experiment has clients 0 to {base.federation.clients - 1}"
        )
    if base.stream.schedule != "synchronous":
        raise UserError(
            f"an audit needs stream.schedule = 'synchronous', not '{base.stream.schedule}'; "
            "--set stream.schedule=synchronous"
        )
    if base.privacy.disjoint_tasks:
        raise UserError(
            "an audit's canaries are in every task, but privacy.disjoint_tasks says that no record "
            "is in two; --set privacy.disjoint_tasks=false"
        )
    if at_server(base) and base.method.name == "prototype":
        raise UserError(
            "an audit plants its canaries in gradients, but method.name 'prototype' adds up "
            "embeddings; audit an experiment that adds up gradients, with noise of the same kind: "
            "deal audit private"
        )


class AuditedCell(Strict):
    """One budget: what it was asked to be, and what the attack has shown."""

    epsilon: str
    p_value: float
    """Of the claim: probability, at most, of guesses as right as these if the ledger is true."""
    bound: LowerBound
    trainings: list[Found]
    """The repetitions."""

    @property
    def claimed(self) -> float:
        """The largest of the repetitions', which may differ in the last digits."""
        return max(each.claimed for each in self.trainings)

    @property
    def refuted(self) -> bool:
        """Has the claim been shown to be wrong?"""
        return self.p_value < SIGNIFICANCE


class Audit(Strict):
    """Schema of ``audit.json``."""

    schema_version: int = 3
    experiment: str
    cells: list[AuditedCell]


def meaning(found: Found) -> str:
    """Return what was planted, and who attacked."""
    return SUMS if found.in_sum else STEPS


def claims(found: Found) -> str:
    """Return what every epsilon of an audit is of."""
    against = f"if these are honest: {found.assumes}" if found.assumes else NOBODY_ELSE
    return (
        f"Every epsilon is at delta = {rounded_up(found.delta, 3)} per "
        f"{unit_text(found.unit, found.unit_column)}, over all rounds and tasks, {against}."
    )


def attack_table(audit: Audit) -> output.Table:
    """Return a row for each budget."""
    rows = []
    for cell in audit.cells:
        scale = cell.bound.scale
        figures = (
            rounded_up(cell.claimed, 3),
            f"{len(cell.trainings)} × {cell.trainings[0].outcomes[0].canaries}",
            f"{cell.bound.epsilon:.2f}",
            f"{cell.p_value:.2g}",
            output.DASH if scale is None else f"× {scale:.2f}",
            "REFUTED" if cell.refuted else "not refuted",
        )
        rows.append(figures)
    columns = ("claim", "canaries", "at least", "p", "refuted noise", "verdict")
    return output.Table("Every budget", columns, tuple(rows))
