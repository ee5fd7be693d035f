from __future__ import annotations

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings are empty: they cost seconds, and the tables have their figures."""
    monkeypatch.setattr("simulations.report.blocks.draw", lambda height, paint, form: b"")
