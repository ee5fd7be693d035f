"""Figures of studies, budgets and audits that were run: ``research/results``."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "research/results"
