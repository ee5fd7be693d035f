"""Settings that came later, and what runs did before them.

A record without such a key is of a run that did this, whatever the default has become. Keys that
are not here do by default what was done before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deal_core.config.file import merged
from deal_core.config.run_config import nested

BEFORE: Mapping[str, bool | float] = MappingProxyType(
    {
        "method.distillation.ahead": 0.0,
        "method.logit_adjustment": 0.0,
        "privacy.disjoint_tasks": False,
        "aggregation.relative_norm_bound": 0.0,
        "aggregation.weight_cap": 0.0,
    }
)


def completed(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded tables of an experiment, with the keys that came after the record."""
    return merged(nested(BEFORE), tables)
