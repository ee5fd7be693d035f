"""Values as TOML text; the standard library only reads TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_value(value: Any) -> str:
    """Return a bool, number, string, list or dict on one line of TOML."""
    if hasattr(value, "item") and not isinstance(value, Mapping):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML string, but for DEL, and for pairs of \u escapes.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return "[" + ", ".join(toml_value(item) for item in value) + "]"


def toml_lines(values: Mapping[str, Any]) -> str:
    """Return one ``key = value`` line per entry; the keys are dotted bare keys."""
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())
