"""A large JSON file, value by value: what has been read is not kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from deal_core.errors import UserError

PIECE = 2**16
"""Characters read at once, at least."""


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the outermost array, each with an empty name. Where the outermost value
    is an object, yield its values with their names, and of an array each element.

    Raises:
        UserError: unreadable file, bytes that are not UTF-8, or no JSON; the message names the
            file.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _values(_Text(file))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Unexpected) else "broken off, or nested too deep"
        raise UserError(f"{path}: not valid JSON ({reason}); download it again") from None


class _Unexpected(ValueError):
    """Another character should stand here."""


class _Text:
    """A file of which the part is in memory that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._place = "", 0
        self._decoder = json.JSONDecoder()

    def next(self) -> str:
        """Return the next character that is not white space; at the end none."""
        while True:
            while self._place < len(self._text):
                if not (character := self._text[self._place]).isspace():
                    return character
                self._place += 1
            if not self._read_on():
                return ""

    def take(self, expected: str) -> str:
        """Return the next character, one of the expected ones, and go on behind it."""
        character = self.next()
        if not character or character not in expected:
            found = f"'{character}'" if character else "the end"
            raise _Unexpected(f"{found} where one of {' '.join(expected)} should be")
        self._place += 1
        return character

    def value(self) -> Any:
        """Return the next value, and go on behind it."""
        self.next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._read_on():
                    raise
                continue
            if end < len(self._text) or not self._read_on():  # a number might go on
                break
        self._place = end
        return value

    def _read_on(self) -> bool:
        """Forget what lies behind and read as much again as lies ahead; false: nothing is left."""
        rest = self._text[self._place :]
        piece = self._file.read(max(PIECE, len(rest)))
        if piece:
            self._text, self._place = rest + piece, 0
        return bool(piece)


def _values(text: _Text) -> Iterator[tuple[str, Any]]:
    if text.next() == "[":
        yield from (("", value) for value in _array(text))
    else:
        yield from _object(text)
    if text.next():
        raise _Unexpected(f"'{text.next()}' behind the end")


def _array(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.next() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.take(",]") == "]":
            return


def _object(text: _Text) -> Iterator[tuple[str, Any]]:
    text.take("{")
    if text.next() == "}":
        text.take("}")
        return
    while True:
        name = str(text.value())
        text.take(":")
        if text.next() == "[":
            yield from ((name, value) for value in _array(text))
        else:
            yield name, text.value()
        if text.take(",}") == "}":
            return
