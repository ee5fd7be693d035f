"""``--epsilon 1,8,inf``: one experiment under several budgets."""

from __future__ import annotations

import math
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError

LARGEST = 1000.0
"""Of ``privacy.target_epsilon``."""


def epsilons(text: str) -> list[float]:
    """Return the budgets in the text, the smallest first; ``inf`` is training without privacy.

    Raises:
        UserError: something in it is no positive number, or stands there twice.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    cure = "write positive numbers or inf, e.g. --epsilon 1,8,inf"
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise UserError(f"--epsilon {text}: {cure}") from None
    if not values or any(not value > 0 for value in values):
        raise UserError(f"--epsilon {text}: {cure}")
    finite = [value for value, word in zip(values, words, strict=True) if word.lower() != "inf"]
    if any(value > LARGEST for value in finite):
        raise UserError(
            f"--epsilon {text}: beyond {LARGEST:g} nothing is hidden; write inf for no privacy"
        )
    if len(set(values)) < len(values):
        raise UserError(f"--epsilon {text}: names a budget twice; name each once")
    return sorted(values)


def named(epsilon: float) -> str:
    """In tables and folders: ``8``, ``0.5``, ``inf``."""
    return f"{epsilon:g}"


def budget_setting(epsilon: float) -> tuple[str, dict[str, Any]]:
    """Return name and tables of a study's setting; a name becomes part of a folder's, so it has no
    dot."""
    name = f"eps-{named(epsilon)}".replace(".", "_").replace("+", "")
    private = {"mechanism": "record", "target_epsilon": epsilon}
    return name, {"privacy": private if math.isfinite(epsilon) else {"mechanism": "none"}}


def with_budget(experiment: Experiment, epsilon: float) -> Experiment:
    """Return the experiment under this budget, by its own mechanism, or ``record`` where it has
    none."""
    own = experiment.privacy.mechanism
    private = "record" if own == "none" else own
    changes: dict[str, object] = {"mechanism": "none"}
    if math.isfinite(epsilon):
        changes = {"mechanism": private, "target_epsilon": epsilon}
    privacy = experiment.privacy.model_copy(update=changes)
    return experiment.model_copy(update={"privacy": privacy})
