"""Columns that look as if they said whose a record is, and name somebody more than once.

Where such a column is there and single records are protected, an epsilon of one record is not one
of a person. Nobody is asked to take the hint: it is a guess from names of columns.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache

from deal_core.config.data import DataConfig
from deal_core.data.files import split_file, task_folders
from deal_core.data.rows import Columns, same_person
from deal_core.data.tables import read_table
from deal_core.errors import UserError, at_home

PEOPLE = (
    *("patient", "person", "subject", "user", "member", "customer", "client", "case", "author"),
    *("speaker", "participant", "individual", "household"),
)
NUMBERS = ("id", "ids", "uid", "uuid", "guid", "pid", "mrn", "ssn", "number", "no", "nr", "key")
ALONE = ("id", "uid", "uuid", "guid", "pid", "mrn", "ssn")
"""Words that name somebody without a word for people beside them."""
OTHERS = ("label", "class", "category", "task", "topic", "intent", "language", "lang", "split")
"""Words beside ``id`` that make it a number of something else."""
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@lru_cache(maxsize=1024)
def looks_like_identifier(column: str) -> bool:
    """Return whether a column's name is that of a number, or name, of a person: ``patient_id``,
    ``PatientID``, ``subject``, ``mrn``; not ``label_id``, ``grid``."""
    words = [word.lower() for word in WORD.findall(column)]
    if not words or not set(OTHERS).isdisjoint(words):
        return False
    if words[-1] in PEOPLE or words[-1] in ALONE:
        return True
    if words[-1] in NUMBERS:
        return not set(PEOPLE).isdisjoint(words)
    return any(words[-1] == person + number for person in PEOPLE for number in NUMBERS)


def repeated_identifiers(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield the columns of training rows that look like identifiers and repeat a value, task by
    task, each with what was found in words; of files alone. Rows that cannot be read end their
    task: they are told of elsewhere."""
    folder = at_home(config.path)
    if config.source not in ("files", "site") or not folder.is_dir():
        return
    wanted = config.tasks or (tuple(config.labels) if config.source == "site" else ())
    for task in task_folders(folder):
        if wanted and task not in wanted:
            continue
        columns = Columns.of(config, task)
        used = {columns.text, columns.label, columns.pair, columns.target}
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        try:
            for _, row in read_table(split_file(folder / task, "train")):
                for column, value in row.items():
                    name = str(column)
                    if value not in (None, "") and name not in used and looks_like_identifier(name):
                        found[name][same_person(str(value))] += 1
        except UserError:
            continue
        for name, values in sorted(found.items()):
            rows = values.total()
            if rows > len(values):
                yield (
                    name,
                    f"column '{name}' of task '{task}' has {len(values)} values in {rows} training "
                    f"rows (one of them in {max(values.values())})",
                )
