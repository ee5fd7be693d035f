"""Where the figures of a benchmark go: a JSON file, looked for before hours are measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from deal_core.config.home import at_home
from deal_core.errors import UserError
from simulations.bench.machine import machine
from simulations.output.files import write_texts

Figures = Mapping[str, Any]


def figures_to(out: str) -> Callable[[Figures], None]:
    """Return what writes figures, and of which machine they are, to a JSON file; what does nothing
    where ``out`` is empty.

    Raises:
        UserError: ``out`` is a folder, or its own folder is not there or cannot be written.
    """
    path = at_home(out)
    if out and path.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if out and not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.parent}; make it first")
    if out and not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {out}: {path.parent} cannot be written; name another file")

    def write(figures: Figures) -> None:
        if out:
            text = json.dumps({"machine": machine(), **figures}, indent=1) + "\n"
            write_texts(path.parent, {path.name: text})

    return write
