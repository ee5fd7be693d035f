"""The checks that need no torch: their answer is there before torch would be."""

from __future__ import annotations

from simulations.check.finding import Check, reading
from simulations.check.odd_settings import check_adapter, check_privacy, check_training
from simulations.check.rows import check_rows

ROWS = "rows"
"""The fact that all rows can be read."""
QUICK = (
    Check(check_rows, reading("data"), settles=ROWS),
    Check(check_training, reading("train", "federation", "adapter", "privacy", "method")),
    Check(check_adapter, reading("adapter", "method")),
    Check(check_privacy, reading("privacy")),
)
