"""The prompt of a generating model: instruction, options, text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptTemplate:
    """Attributes: ``before`` and ``after`` the text, as written in ``model.template``."""

    before: str
    after: str

    def around(self, instruction: str, labels: Sequence[str]) -> tuple[str, str]:
        """Return what stands before and after the text of a task; without labels the line of the
        options is left out.

        Args:
            instruction: of the task.
            labels: answers among which is chosen; none: free text.
        """
        options = ", ".join(map(words, labels))
        lines = [
            line.replace("{instruction}", instruction).replace("{options}", options)
            for line in self.before.splitlines(keepends=True)
            if labels or "{options}" not in line
        ]
        return "".join(lines), self.after


def read_template(template: str) -> PromptTemplate:
    """Return the template, cut at the text.

    Raises:
        ValueError: ``{text}`` does not occur exactly once, or what a task decides comes after it.
    """
    parts = template.split("{text}")
    if len(parts) != 2 or "{options}" in parts[1] or "{instruction}" in parts[1]:
        raise ValueError(
            "model.template: needs {text} once, and what is the same for all before it"
        )
    return PromptTemplate(*parts)


def words(label: str) -> str:
    """Return a label as it stands in a prompt."""
    return label.replace("_", " ")
