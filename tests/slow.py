"""Which cases of a test are left to ``make test-slow``."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the values of one argument, all but ``kept`` marked slow."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
