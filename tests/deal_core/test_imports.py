from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import pytest

from deal_core.imports import without_collection


@pytest.fixture
def thawed() -> None:
    """The collector as it was, after the test."""
    frozen, was_on = gc.get_freeze_count(), gc.isenabled()
    yield
    assert gc.isenabled() == was_on
    if not frozen:
        gc.unfreeze()


def test_nothing_is_collected_while_modules_are_imported_and_they_stay(
    thawed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_here.py").write_text("import gc\nON = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with without_collection():
        module = importlib.import_module("imported_here")
    assert not module.ON
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    del sys.modules["imported_here"]


def test_where_nothing_is_imported_garbage_stays_garbage(thawed: None) -> None:
    before = gc.get_freeze_count()
    with without_collection():
        importlib.import_module("json")
    assert gc.get_freeze_count() == before
    with pytest.raises(ImportError), without_collection():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
