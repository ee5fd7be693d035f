"""``deal budgets``: accuracy against the privacy budget; resumable, on the machinery of studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from deal_core.atomic_write import atomic_path
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, at_home
from simulations.budgets.budget_study import budgets_study
from simulations.budgets.plot import draw
from simulations.budgets.results import Budgets, check_unit, collect, read_audit
from simulations.budgets.tables import markdown
from simulations.output.console import print_line, print_page, require_one_kind
from simulations.output.files import write_texts
from simulations.output.stored import read_stored
from simulations.run.epsilons import epsilons, with_budget
from simulations.run.experiment import Request, load_experiment
from simulations.run.simulate import STOPPED
from simulations.study.command import FAILED, check_left, names, numbers, remaining, run_left
from simulations.study.grid import grid


@dataclass(frozen=True)
class BudgetsRequest:
    """The arguments of ``deal budgets``.

    Attributes:
        experiment: a shipped name or the path of a TOML file.
        epsilon, method, seeds: separated by commas; no method: the experiment's.
        out: folder; empty: ``runs/budgets-NAME``.
        overrides: ``table.key=value``, for all runs.
        noise: of ``privacy.noise_share``, separated by commas; empty: the experiment's.
        free: the experiment of the runs without privacy; empty: the same one.
        beside: other experiments at the same budgets, separated by commas.
        audit: folder of a ``deal audit``; empty: none.
        jobs: runs at a time; 0: as many as there are cores for.
        report: only read what is there, and run nothing.
    """

    experiment: str
    epsilon: str = "1,2,4,8,inf"
    method: str = ""
    seeds: str = "0,1,2"
    out: str = ""
    overrides: tuple[str, ...] = ()
    audit: str = ""
    jobs: int = 0
    report: bool = False
    free: str = ""
    noise: str = ""
    beside: str = ""


def run_budgets(request: BudgetsRequest, console: Console) -> int:
    """Run what is left of the grid.

    Returns:
        The exit code: 0; 1 where a run failed; 130 where it was stopped.

    Raises:
        UserError: bad input, or a folder with other settings; nothing has started.
    """
    out = budgets_folder(request)
    require_one_kind(out, "budgets.json")
    values, methods = epsilons(request.epsilon), names(request.method)
    _require_one_place(request.overrides)
    base = load_experiment(Request(request.experiment, "", request.overrides))
    free = load_experiment(Request(request.free, "", request.overrides)) if request.free else None
    seeds = numbers(request.seeds)
    study = budgets_study(
        request.experiment,
        base,
        values,
        methods,
        seeds,
        free,
        names(request.noise),
        _beside(request),
        request.overrides,
    )
    cells = grid(study, out)
    audit = read_audit(request.audit)
    if audit is not None:
        check_unit(audit, with_budget(base, 1.0))
    unfinished = remaining(cells, cells)
    if len(unfinished) == len(cells):
        _require_no_figures(out)
    left = {} if request.report else unfinished

    def renew() -> None:
        write(out, collect(study.path.stem, cells, values, audit))

    if left:
        check_left(left, console)
    renew()
    again = command(request)
    failures = run_left(left, out, request.jobs, again, renew, console) if left else {}
    if failures is None:
        return STOPPED
    page = out / "budgets.md"
    print_page(console, page.read_text(encoding="utf-8"))
    print_line(
        console, f"table in {page}, figures in {out / 'budgets.json'}, {out / 'budgets.png'}"
    )
    for name, why in failures.items():
        print_line(console, f"failed: {name}: {why}")
    return FAILED if failures else 0


def _require_one_place(overrides: Sequence[str]) -> None:
    """Check that budgets are named by ``--epsilon`` alone.

    Raises:
        UserError: ``--set`` names one as well.
    """
    for override in overrides:
        if override.partition("=")[0].strip() == "privacy.target_epsilon":
            raise UserError(f"--set {override}: budgets are those of --epsilon; leave it out")


def _require_no_figures(out: Path) -> None:
    """Check that nothing is overwritten where no run of the folder is there to renew it from.

    Raises:
        UserError: the folder has figures, and none of their runs.
    """
    stored = out / "budgets.json"
    cure = "remove it, or name another --out"
    if stored.exists() and read_stored(Budgets, stored, "budget study", cure).points:
        raise UserError(f"{stored} has figures, but their runs are not there; name another --out")


def _beside(request: BudgetsRequest) -> dict[str, Experiment]:
    """Return name to experiment of ``--beside``.

    Raises:
        UserError: one is not there, or two have one name.
    """
    found: dict[str, Experiment] = {}
    for name in names(request.beside):
        stem = Path(name).stem
        if stem in found:
            raise UserError(f"--beside {request.beside}: names '{stem}' twice; rename a file")
        found[stem] = load_experiment(Request(name, "", request.overrides))
    return found


def budgets_folder(request: BudgetsRequest) -> Path:
    """Return the folder of a budget study."""
    stem = Path(request.experiment).stem
    return at_home(request.out or f"runs/budgets-{stem}").resolve()


def write(out: Path, budgets: Budgets) -> None:
    """Write ``budgets.json``, ``budgets.md`` and, as soon as there is a point, ``budgets.png``.

    Raises:
        UserError: the folder cannot be written.
    """
    texts = {
        "budgets.json": budgets.model_dump_json(indent=1) + "\n",
        "budgets.md": markdown(budgets),
    }
    write_texts(out, texts)
    if not budgets.points:
        return
    try:
        with atomic_path(out / "budgets.png") as beside:
            draw(beside, budgets)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None


def command(request: BudgetsRequest) -> Sequence[str]:
    """Return the command again: it goes on where it was stopped."""
    words = ["deal", "budgets", request.experiment, "--epsilon", request.epsilon]
    words += ["--seeds", request.seeds]
    for option, value in (
        ("--method", request.method),
        ("--noise", request.noise),
        ("--without-privacy", request.free),
        ("--beside", request.beside),
        ("--out", request.out),
        ("--audit", request.audit),
        ("--jobs", str(request.jobs or "")),
    ):
        words += [option, value] if value else []
    for override in request.overrides:
        words += ["--set", override]
    return words
