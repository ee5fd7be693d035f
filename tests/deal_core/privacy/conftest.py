"""Fixtures of tests of mechanisms."""

import pytest

from deal_core.privacy.interface import Site
from deal_core.privacy.ledger import Ledger


@pytest.fixture
def site(tmp_path) -> Site:
    """A real site without a policy, whose ledger is empty."""
    return Site(lambda: Ledger(tmp_path), None, simulated=False)
