"""Rows that a program passes as objects, as a source of tasks: ``given:DIGEST``, equal for equal
rows, known while the process lasts."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any

from deal_core.config.data import DataConfig
from deal_core.data.rows import same_person, whole_characters
from deal_core.data.source import Example, Sides, TaskData, limited, named_tasks
from deal_core.data.tags import read_tagged
from deal_core.errors import UserError

GIVEN = "given:"
_known: dict[str, Mapping[str, Sides]] = {}


def keep_rows(tasks: Mapping[str, Sides]) -> str:
    """Return the ``data.source`` under which the rows of tasks are known from now on."""
    hashed = hashlib.sha256()
    for task, sides in sorted(tasks.items()):
        known = [task, [[astuple(row) for row in side] for side in sides]]
        hashed.update(json.dumps(known).encode())
    source = f"{GIVEN}{hashed.hexdigest()[:12]}"
    _known[source] = tasks
    return source


class GivenTasks:
    """Tasks and labels as the experiment names them, and rows as they were passed."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        if config.source not in _known:
            raise UserError(
                f"data.source '{config.source}': rows that a program passes, and this one has "
                "passed none of the kind"
            )
        if unit_column:
            raise UserError("privacy.unit_column: rows that a program passes have no columns")
        self._config, self._tasks = config, _known[config.source]

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or all."""
        return self._config.tasks or tuple(self._tasks)

    def load(self, task: str) -> TaskData:
        """Return a task.

        Raises:
            UserError: a row has a label that the task has not.
        """
        labels = self._config.labels.get(task, ())
        sides = []
        given = self._tasks.get(task, ((), ()))  # a client need not have rows of every task
        for kind, rows in zip(("training", "test"), given, strict=True):
            for place, row in enumerate(rows):
                where = f"task '{task}', {kind} row {place}"
                _require_tags(row, where)
                if self._config.tagged(task) != bool(row.tags):
                    raise UserError(f"{where}: tags of words go with a model that tags them alone")
                if labels and (others := row.labels.difference(labels)):
                    raise UserError(
                        f"{where}: its label '{min(others)}' is not one of {', '.join(labels)}; "
                        "add it to the task, or leave the row out"
                    )
            texts = (replace(row, label="", target=row.target or row.label) for row in rows)
            sides.append(rows if labels else tuple(texts))
        every = (row for both in self._tasks.values() for side in both for row in side)
        groups = tuple(sorted({row.group for row in every}))
        return limited(TaskData(task, labels, sides[0], sides[1], groups), self._config)


def usable(tasks: Mapping[str, Sides], config: DataConfig) -> tuple[dict[str, Sides], Counter[str]]:
    """Return the rows of the tasks that a site has declared which can be used, and of every task
    how many cannot. As with a site's files each row is judged by itself: it has a text, a label of
    its task or an answer, and, where ``data.id_column`` says that records have one, an id."""
    left_out = Counter[str]()

    def side(task: str, rows: tuple[Example, ...]) -> tuple[Example, ...]:
        kept = tuple(row for row in rows if _can_be_used(row, config, task))
        left_out.update({task: len(rows) - len(kept)} if len(kept) < len(rows) else {})
        return tuple(replace(row, id=same_person(row.id)) if row.id else row for row in kept)

    own = {task: sides for task, sides in tasks.items() if task in named_tasks(config)}
    return {task: (side(task, a), side(task, b)) for task, (a, b) in own.items()}, left_out


def _can_be_used(row: Example, config: DataConfig, task: str) -> bool:
    labels = config.labels.get(task, ())
    answer = row.label if labels else row.target or row.label
    texts = (row.text, answer, row.id, row.unit, *row.references)
    if not all(isinstance(each, str) for each in texts):
        return False
    try:
        for each in texts:
            whole_characters(each, task)
        _require_tags(row, task)
    except UserError:
        return False
    if not row.text.strip() or not (row.id.strip() or not config.id_column):
        return False
    if config.tagged(task) != bool(row.tags) or not (row.tags or answer.strip()):
        return False
    return not labels or row.labels.issubset(labels)


def read_rows(task: str, given: Any) -> Sides:
    """Return the rows of a task: ``{"train": rows, "test": rows}``, or a pair of them.

    Raises:
        UserError: it is neither, or a row is none.
    """
    sides = [given.get("train", ()), given.get("test", ())] if isinstance(given, Mapping) else given
    whole = isinstance(sides, (tuple, list)) and len(sides) == 2
    if not whole or any(isinstance(e, str) or not isinstance(e, Iterable) for e in sides):
        raise UserError(
            f"task '{task}': give {{'train': rows, 'test': rows}}, or a pair of lists of rows"
        )
    train, test = (
        tuple(_example(row, f"task '{task}', row {place}") for place, row in enumerate(side))
        for side in sides
    )
    return train, test


def _example(row: Any, where: str) -> Example:
    if isinstance(row, Example):
        return row
    if isinstance(row, Mapping) and "tags" in row:
        return _tagged(row.get("tokens"), row["tags"], where)
    if isinstance(row, Mapping):
        row = row.get("text"), row.get("label", row.get("target"))
    if isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(e, str) for e in row):
        return Example(row[0], row[1])
    raise UserError(
        f"{where}: should be (text, answer), a mapping with text and label, both strings, or with "
        "tokens and tags, two lists, or an Example"
    )


def _tagged(words: Any, tags: Any, where: str) -> Example:
    try:
        text, read = read_tagged(words, tags, {})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Example(text, "", tags=read)


def _require_tags(row: Example, where: str) -> None:
    """Raise a UserError for an example whose tags are not those of its words."""
    if row.tags:
        _tagged(row.text.split(), [*row.tags], where)
