"""From ``deal budgets`` to a study: an arm for every budget, a setting for every method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deal_core.config import Experiment
from deal_core.errors import UserError, choose
from deal_core.experiment_file import apply_overrides, parse_experiment
from deal_core.methods import METHODS
from simulations.epsilons import named, with_budget
from simulations.experiment import find_experiment
from simulations.study_file import Arm, Study, StudyFile


def arm_name(epsilon: float) -> str:
    """Of a budget; a name becomes part of a folder's name, so it has no dot."""
    return f"eps-{named(epsilon)}".replace(".", "_").replace("+", "")


def budgets_study(
    name: str,
    base: Experiment,
    epsilons: list[float],
    methods: list[str],
    seeds: int,
    free: Sequence[str] = (),
) -> Study:
    """The grid.

    Args:
        name: a shipped experiment or the path of one.
        base: that experiment, read with its overrides.
        epsilons: budgets; infinity is training without privacy.
        methods: empty: the experiment's own.
        seeds: so many, from 0.
        free: ``table.key=value``, for the runs without privacy alone: what suits noise need not
            suit them.

    Raises:
        UserError: an unknown method, or one that stands there twice; a ``free`` key that is none.
    """
    own = methods or [base.method.name]
    for method in own:
        choose("method", method, METHODS)
    if len(set(own)) < len(own):
        raise UserError(f"--method {','.join(own)}: names a method twice; name each once")
    path = find_experiment(name).expanduser().resolve()
    file = StudyFile(
        description=f"Accuracy of {path.stem} against the privacy budget.",
        experiment=str(path),
        seeds=tuple(range(seeds)),
        arms={arm_name(epsilon): _arm(base, epsilon, free) for epsilon in epsilons},
        settings={method: {"method": {"name": method}} for method in own},
    )
    return Study(f"budgets-{path.stem}", path, file)


def _arm(base: Experiment, epsilon: float, free: Sequence[str]) -> Arm:
    privacy = with_budget(base, epsilon).privacy
    changed = {"mechanism": privacy.mechanism, "target_epsilon": privacy.target_epsilon}
    tables = apply_overrides({"privacy": changed}, () if math.isfinite(epsilon) else free)
    parse_experiment(tables, "--without-privacy")
    return Arm(label=f"epsilon = {named(epsilon)}", set=tables)
