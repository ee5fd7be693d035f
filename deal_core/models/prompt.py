"""The prompt of a generating model: instruction, options, text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Halves = tuple[str, str]
"""What stands before and after the text."""


@dataclass(frozen=True)
class PromptTemplate:
    """Attributes: ``choosing``, the form for a task with labels; ``writing``, without the lines
    that name the options."""

    choosing: Halves
    writing: Halves

    def around(self, instruction: str, labels: Sequence[str]) -> Halves:
        """Return what stands before and after the text of a task.

        Args:
            instruction: of the task.
            labels: answers among which is chosen; none: free text.
        """
        before, after = self.choosing if labels else self.writing
        options = ", ".join(map(words, labels))
        return before.replace("{instruction}", instruction).replace("{options}", options), after


def read_template(
    template: str, wrap: Callable[[str], str] = lambda message: message
) -> PromptTemplate:
    """Return the template, cut at the text.

    Args:
        template: ``model.template``.
        wrap: what is put around it (a chat template).

    Raises:
        ValueError: ``{text}`` does not occur exactly once, what a task decides comes after it, or
            options are on its line.
    """
    choosing = _halves(wrap(template))
    lines = template.splitlines(keepends=True)
    if any("{options}" in line and "{text}" in line for line in lines):
        raise ValueError(
            "needs {options} on another line than {text}: it is left out where answers are texts"
        )
    writing = "".join(line for line in lines if "{options}" not in line)
    return PromptTemplate(choosing, _halves(wrap(writing)))


def _halves(prompt: str) -> Halves:
    parts = prompt.split("{text}")
    if len(parts) != 2 or "{options}" in parts[1] or "{instruction}" in parts[1]:
        raise ValueError("needs {text} once, and what is the same for all texts before it")
    return parts[0], parts[1]


def words(label: str) -> str:
    """Return a label as it stands in a prompt."""
    return label.replace("_", " ")
