"""From ``deal budgets`` to a study: an arm for every budget, a setting for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, overlaid
from deal_core.errors import UserError, at_home, choose
from deal_core.methods import METHODS
from simulations.budgets.curve_names import BETWEEN
from simulations.run.epsilons import named, with_budget
from simulations.run.experiment import find_experiment
from simulations.study.study_file import Arm, Study, StudyFile

COMMON = ("model", "data", "stream")
"""Tables in which all runs of a study agree."""


def arm_name(epsilon: float) -> str:
    """Of a budget; a name becomes part of a folder's name, so it has no dot."""
    return f"eps-{named(epsilon)}".replace(".", "_").replace("+", "")


def budgets_study(
    name: str,
    base: Experiment,
    epsilons: list[float],
    methods: list[str],
    seeds: list[int],
    free: Experiment | None = None,
    shares: list[str] | None = None,
    beside: Mapping[str, Experiment] | None = None,
    overrides: Sequence[str] = (),
) -> Study:
    """Return the grid.

    Args:
        name: a shipped experiment or the path of one.
        base: that experiment, read with its overrides.
        epsilons: budgets; infinity is training without privacy.
        methods: empty: the experiment's own.
        seeds: of the runs.
        free: experiment of the runs without privacy, where what suits noise does not suit them;
            None: ``base``.
        shares: of ``privacy.noise_share``, to be compared; none: the experiment's own.
        beside: name to another experiment, whose runs have the same budgets.
        overrides: ``table.key=value``, for all runs; budgets, methods and shares hold over them.

    Raises:
        UserError: an unknown method; a method or a seed that stands there twice; no seed, or a
            negative one; ``free``, or one of ``beside``, has another model, other data or other
            clients, or ``free`` another method while none is named; one of ``beside`` has the name
            of a method.
    """
    own = methods or [base.method.name]
    for method in own:
        choose("method", method, METHODS)
    if len(set(own)) < len(own):
        raise UserError(f"--method {','.join(own)}: names a method twice; name each once")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError("--seeds: write different whole numbers from 0 on, e.g. --seeds 0,1,2")
    if free is not None and not methods and free.method.name != base.method.name:
        raise UserError(
            f"--without-privacy: its method is {free.method.name}, the experiment's is "
            f"{base.method.name}; name the methods to compare with --method"
        )
    without = _tables("--without-privacy", free, base) if free is not None else {}
    without.get("method", {}).pop("name", None)
    path = at_home(find_experiment(name)).resolve()
    file = StudyFile(
        description=f"Accuracy of {path.stem} against the privacy budget.",
        experiment=str(path),
        seeds=tuple(seeds),
        set=apply_overrides({}, overrides),
        arms={arm_name(epsilon): _arm(base, epsilon, without) for epsilon in epsilons},
        settings=_distinct(_settings(own, shares or [], base), _others(beside or {}, base)),
    )
    return Study(f"budgets-{path.stem}", path, file)


def _distinct(
    compared: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return both.

    Raises:
        UserError: a name stands for two things.
    """
    for name in others:
        if name in compared:
            raise UserError(
                f"--beside {name}: is the name of a method that is compared; rename the file"
            )
    return compared | others


def _settings(methods: list[str], shares: list[str], base: Experiment) -> dict[str, dict[str, Any]]:
    """Return name to tables of what is compared: methods, and whose noise protects a record.

    Raises:
        UserError: a share that there is not, or that stands there twice.
    """
    if set(shares) - {"site", "sum"} or len(set(shares)) < len(shares):
        raise UserError(f"--noise {','.join(shares)}: write site, sum or both, each once")
    compared: dict[str, dict[str, Any]] = {}
    for method in methods:
        for share in shares or [base.privacy.noise_share]:
            name = method if share == base.privacy.noise_share else f"{method}{BETWEEN}{share}"
            compared[name] = {"method": {"name": method}, "privacy": {"noise_share": share}}
    return compared


def _others(beside: Mapping[str, Experiment], base: Experiment) -> dict[str, dict[str, Any]]:
    """Return name to all tables of an experiment that stands beside; the budget is the arm's.

    Raises:
        UserError: its accuracy, or its epsilon, could not be compared.
    """
    found = {}
    for name, other in beside.items():
        if other.privacy.target_delta != base.privacy.target_delta:
            raise UserError(f"--beside {name}: privacy.target_delta differs; make both the same")
        tables = _tables(f"--beside {name}", other, base)
        for key in ("mechanism", "target_epsilon"):
            del tables["privacy"][key]
        found[name] = tables
    return found


def _arm(base: Experiment, epsilon: float, without: Mapping[str, Any]) -> Arm:
    privacy = with_budget(base, epsilon).privacy
    changed = {"mechanism": privacy.mechanism, "target_epsilon": privacy.target_epsilon}
    own = {} if math.isfinite(epsilon) else without
    return Arm(label=f"epsilon = {named(epsilon)}", set=overlaid(own, {"privacy": changed}))


def _tables(option: str, other: Experiment, base: Experiment) -> dict[str, Any]:
    """Return all of another experiment but what both have in common.

    Raises:
        UserError: its accuracy could not be compared.
    """
    for name in COMMON:
        if getattr(other, name) != getattr(base, name):
            raise UserError(f"{option}: [{name}] is another one; make both the same")
    for key in ("clients", "participants"):
        if getattr(other.federation, key) != getattr(base.federation, key):
            raise UserError(f"{option}: federation.{key} differs; make both the same")
    return other.model_dump(mode="json", exclude={"description", "run", *COMMON})
