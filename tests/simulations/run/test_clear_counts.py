"""Counts in the clear can name test records: said where sites are asked, and nowhere else."""

from __future__ import annotations

import pytest

from deal_core.config.file import parse_experiment
from simulations.run.findings import CLEAR_COUNTS, check_privacy


@pytest.mark.parametrize(
    ("source", "metrics", "said"),
    [("sites", "clear", True), ("sites", "summed", False), ("medmcqa", "clear", False)],
)
def test_counts_in_the_clear_are_said_of_sites(source, metrics, said):
    tables = {"data": {"source": source}, "privacy": {"metrics": metrics}}
    found = [finding.text for finding in check_privacy(parse_experiment(tables, "test"))]
    assert any(CLEAR_COUNTS in text for text in found) == said
