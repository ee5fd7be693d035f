"""``deal audit``: attack a mechanism under several budgets, and say what is shown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deal_core.config.experiment import Experiment, at_server
from deal_core.errors import UserError, at_home
from deal_core.privacy.audit.canary_room import with_room
from deal_core.privacy.audit.planted_sum import require_gradients_in_sum
from simulations.audit.found import Found, Kind, Training
from simulations.audit.judged import judged
from simulations.audit.run import carry_out, known
from simulations.audit.tables import Audit, AuditedCell, markdown
from simulations.engines.interrupt import stoppable
from simulations.output.console import print_line, print_page, require_one_kind
from simulations.output.files import write_texts
from simulations.run.experiment import Request, epsilons, load_experiment, named, with_budget
from simulations.run.live_view import progress_view
from simulations.run.preflight import preflight
from simulations.run.simulate import STOPPED

REFUTED = 1
"""Exit code where a claim has been shown to be wrong."""
DELTA = 1e-5
"""Where the experiment names none: canaries can refute nothing at a delta of 1 / canaries."""


def kinds_of(experiment: Experiment) -> tuple[Kind, ...]:
    """Return the kinds of canaries of an audit; where the server takes the steps nothing of a site
    is seen but a sum."""
    return ("sums",) if at_server(experiment) else ("gradients", "texts")


@dataclass(frozen=True)
class AuditRequest:
    """The arguments of ``deal audit``.

    Attributes:
        experiment: a shipped name or the path of a TOML file.
        epsilon: budgets, separated by commas.
        out: folder; empty: ``runs/audit-NAME``.
        overrides: ``table.key=value``.
        client: the site that is attacked.
        canaries, text_canaries: gradients (at most as many as there is room for); texts a task, 0:
            none are planted.
        seed: of the canaries.
        repetitions: trainings with gradients for every budget.
        records: real ones of a task beside gradient canaries; 0: all.
    """

    experiment: str
    epsilon: str = "1,8,inf"
    out: str = ""
    overrides: tuple[str, ...] = ()
    client: int = 0
    canaries: int = 2000
    text_canaries: int = 200
    seed: int = 0
    repetitions: int = 8
    records: int = 32


def run_audit(request: AuditRequest, console: Console) -> int:
    """Train what is left, and report.

    Returns:
        The exit code: 0; 1 where a claim is refuted; 130 where it was stopped.

    Raises:
        UserError: bad input, or a folder with other settings; nothing has started.
    """
    out = audit_folder(request)
    require_one_kind(out, "audit.json")
    trainings = planned(request, out)
    with console.status("checking the experiment and its data"):
        for training in trainings:
            known(training)
        preflight(trainings[0].experiment)
    try:
        with stoppable():
            found = [_carried_out(training, console) for training in trainings]
    except KeyboardInterrupt:
        print_line(console, f"stopped; continue with: {shlex.join(command(request))}")
        return STOPPED
    with console.status("judging"):
        audit = Audit(experiment=Path(request.experiment).stem, cells=_cells(request, found))
    page = markdown(audit)
    write_texts(out, {"audit.json": audit.model_dump_json(indent=1) + "\n", "audit.md": page})
    print_page(console, page)
    print_line(console, f"figures in {out / 'audit.json'}, table in {out / 'audit.md'}")
    refuted = any(each.refuted for cell in audit.cells for each in cell.attacks)
    return REFUTED if refuted else 0


def audit_folder(request: AuditRequest) -> Path:
    """Return the folder of an audit."""
    stem = Path(request.experiment).stem
    return at_home(request.out or f"runs/audit-{stem}").resolve()


def planned(request: AuditRequest, out: Path) -> list[Training]:
    """Return all trainings: every budget, with every kind of canaries.

    Raises:
        UserError: bad input.
    """
    base = load_experiment(Request(request.experiment, str(out), request.overrides))
    _check(request, base)
    counts = {kind: _canaries(request, base, kind) for kind in kinds_of(base)}
    return [
        _training(request, base, epsilon, kind, count, repeat, out)
        for epsilon in epsilons(request.epsilon)
        for kind, count in counts.items()
        for repeat in range(_repetitions(request, kind))
    ]


def _repetitions(request: AuditRequest, kind: Kind) -> int:
    """Texts tell little, and take long: one training."""
    if kind == "texts":
        return 1 if request.text_canaries else 0
    return request.repetitions


def _canaries(request: AuditRequest, base: Experiment, kind: Kind) -> int:
    """Return how many are planted in a training."""
    if kind == "texts":
        return request.text_canaries
    return with_room(base, request.canaries)


def _training(
    request: AuditRequest,
    base: Experiment,
    epsilon: float,
    kind: Kind,
    canaries: int,
    repeat: int,
    out: Path,
) -> Training:
    name = f"{kind}-{named(epsilon)}" + ("" if kind == "texts" else f"-{repeat}")
    return Training(
        experiment=_settled(base, epsilon, out / "cells" / name, request.client, repeat),
        kind=kind,
        client=request.client,
        canaries=canaries,
        seed=request.seed,
        delta=base.privacy.target_delta or DELTA,
        records=0 if kind == "texts" else request.records,
        repeat=repeat,
    )


def _settled(
    base: Experiment, epsilon: float, folder: Path, client: int, repeat: int
) -> Experiment:
    """Return one site alone, or, where the noise is in a sum, all of them; in this process, and
    every update as it was made."""
    config = with_budget(base, epsilon)
    delta = config.privacy.target_delta or DELTA
    privacy = config.privacy.model_copy(update={"target_delta": delta})
    alone = not at_server(config)
    federation = config.federation
    if alone:
        federation = federation.model_copy(update={"participants": (client,)})
    aggregation = config.aggregation.model_copy(update={"robust": "none"})
    wire = config.wire.model_copy(update={"dtype": "float32"})
    keys = {"out": str(folder), "resume": False, "workers": 1, "engine": "inprocess"}
    keys |= {"seed": config.run.seed + repeat}  # of the noise
    # small passes: threads that wait for each other on a busy machine cost more than they save
    keys |= {"threads": config.run.threads or 1}
    return config.model_copy(
        update={
            "privacy": privacy,
            "federation": federation,
            "aggregation": aggregation,
            "wire": wire,
            "run": config.run.model_copy(update=keys),
        }
    )


def _check(request: AuditRequest, base: Experiment) -> None:
    if not 0 <= request.client < base.federation.clients:
        raise UserError(
            f"--client {request.client}: the experiment has clients 0 to "
            f"{base.federation.clients - 1}"
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
    if at_server(base):
        require_gradients_in_sum(base)


def _carried_out(training: Training, console: Console) -> Found:
    before = known(training)
    if before is not None:
        return before
    name = training.folder.name
    print_line(console, f"training {name}")
    with progress_view(console, name) as listener:
        return carry_out(training, listener)


def _cells(request: AuditRequest, found: Sequence[Found]) -> list[AuditedCell]:
    budgets = epsilons(request.epsilon)
    per_budget = len(found) // len(budgets)
    cells = []
    for i, epsilon in enumerate(budgets):
        own = found[i * per_budget : (i + 1) * per_budget]
        kinds = dict.fromkeys(each.kind for each in own)
        attacks = [judged([each for each in own if each.kind == kind]) for kind in kinds]
        cells.append(AuditedCell(epsilon=named(epsilon), attacks=attacks))
    return cells


def command(request: AuditRequest) -> list[str]:
    """Return the command again: it goes on where it was stopped."""
    words = ["deal", "audit", request.experiment]
    numbers = ("client", "canaries", "text_canaries", "seed", "repetitions", "records")
    for field in ("epsilon", "out", *numbers):
        value = str(getattr(request, field))
        words += [f"--{field.replace('_', '-')}", value] if value else []
    for override in request.overrides:
        words += ["--set", override]
    return words
