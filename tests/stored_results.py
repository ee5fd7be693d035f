"""Figures of studies, budgets and audits that were run: ``research/results``."""

from pathlib import Path

RESULTS = Path(__file__).parents[1] / "research/results"
