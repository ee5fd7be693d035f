from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

import pytest

from deal_core.installed import without_collection


def test_the_collector_rests_and_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_here.py").write_text("import gc\nON = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with without_collection():
        module = importlib.import_module("imported_here")
    assert not module.ON
    assert gc.isenabled()
    del sys.modules["imported_here"]
    with pytest.raises(ImportError), without_collection():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
