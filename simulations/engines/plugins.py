"""Methods, rules, models and sources of a user's own, from files that an experiment names.

A plugin adds entries to the registries when it is imported, in every process of a simulation. A
site of a deployment runs what is installed there, and reads no plugin.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import walk_tb

from deal_core.errors import UserError

_loaded: set[str] = set()
_told: set[str] = set()


def load_plugins(paths: Sequence[str]) -> None:
    """Import each file, once in a process.

    Raises:
        UserError: a file is missing or has a fault, named with its line.
    """
    for path in paths:
        if path in _loaded:
            continue
        if not Path(path).is_file():
            raise UserError(f"plugins: {path}: no such file")
        if not _loaded:
            logging.getLogger("client.identity").addFilter(_in_one_line)
        _loaded.add(path)
        name = f"deal_plugin_{Path(path).stem}"
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"plugins: {path}: is no Python file; name one that ends in .py")
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            _loaded.discard(path)
            fault = own_fault(error, {path}) or f"{path}: {type(error).__name__}: {error}"
            raise UserError(fault) from None


def own_fault(error: BaseException, files: set[str] = _loaded) -> str:
    """Return file, line and text of an error that was raised in a plugin, or below it; empty: it
    was not."""
    if isinstance(error, SyntaxError) and error.filename in files:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    places = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_code.co_filename in files
    ]
    return f"{places[-1]}: {type(error).__name__}: {error}" if places else ""


def _in_one_line(record: logging.LogRecord) -> bool:
    """Let a client's log tell a fault of a plugin in one line, and once."""
    _, error, _ = record.exc_info or (None, None, None)
    fault = own_fault(error) if error is not None else ""
    if not fault:
        return True
    record.msg, record.args, record.exc_info = fault, (), None
    first = fault not in _told
    _told.add(fault)
    return first
