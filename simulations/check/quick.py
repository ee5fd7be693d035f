"""The checks that need no torch: their answer is there before torch would be."""

from __future__ import annotations

from simulations.check.finding import Check, reading
from simulations.check.odd_settings import check_odd_settings
from simulations.check.rows import check_rows

ROWS = "rows"
"""The fact that all rows can be read."""
QUICK = (
    Check(check_rows, reading("data"), settles=ROWS),
    Check(check_odd_settings, reading("train", "federation", "adapter", "method", "privacy")),
)
