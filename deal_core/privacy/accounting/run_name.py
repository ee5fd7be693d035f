"""A name for an experiment: what a ledger files its releases under."""

from __future__ import annotations

import hashlib
import json

from deal_core.config.experiment import Experiment
from deal_core.config.later_keys import BEFORE
from deal_core.config.run_config import WHERE, flatten


def run_name(experiment: Experiment) -> str:
    """Equal for runs that release the same; a key that came later says nothing while it does what
    was done before it."""
    settings = flatten(experiment)
    for key in WHERE:
        settings.pop(key)
    for key, value in BEFORE.items():
        if settings[key] == value:
            settings.pop(key)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
