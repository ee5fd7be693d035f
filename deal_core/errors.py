"""The one exception a user can cause: its message is the whole story."""

import difflib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and the cure.

    The command line prints it and exits with code 2; nothing has been lost. Where several things
    are wrong each is an argument, and a line.
    """

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a line each."""
        return tuple(str(problem) for problem in self.args)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def choose(kind: str, name: str, known: Mapping[str, T], plugins: str = "") -> T:
    """Return what a registry has under ``name``, or another package, as an entry point of the group
    ``federated_deal.PLUGINS``.

    Raises:
        UserError: the name is unknown; the message lists the known ones.
    """
    if plugins and name not in known:
        added = entry_points(group=f"federated_deal.{plugins}")
        known = {**known, **{each.name: each.load() for each in added if each.name == name}}
    if name not in known:
        listed = ", ".join(sorted(known))
        raise UserError(f"unknown {kind} '{name}'; known: {listed}{nearest(name, known)}")
    return known[name]


def at_home(name: str | Path) -> Path:
    """Return a path in which ``~`` is the home folder, and ``~ann`` that of Ann.

    Raises:
        UserError: nobody has that name here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such home folder; write the whole path") from None
