from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.imports import without_collection


def test_nothing_is_collected_while_modules_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_here.py").write_text("import gc\nON = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with without_collection():
        module = importlib.import_module("imported_here")
    assert not module.ON
    assert gc.isenabled()
    del sys.modules["imported_here"]


def test_the_collector_is_as_it_was_whatever_happens() -> None:
    with pytest.raises(ImportError), without_collection():
        importlib.import_module("no_such_module")
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_process_ends_without_a_word() -> None:
    """Objects that were kept from the collector would be told as leaks of torch's bindings."""
    program = "from deal_core.imports import without_collection\nwith without_collection():\n"
    program += "    import torch\n"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ended.stderr == b""
