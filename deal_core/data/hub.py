"""Any data set that ``datasets.load_dataset`` can read: the hub, or a local folder.

CSV files are read as what is written there: pandas, which reads them for the library, guesses: a
code ``01`` becomes the number 1, a text ``NA`` nothing, and where all rows have a field more than
the header the first one becomes the name of the row, and is lost.
"""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from yaml import YAMLError

from deal_core.config.data import DataConfig, HubTask
from deal_core.data.rows import Columns, EmptyRow, groups_of, require_columns, shaped, to_example
from deal_core.data.source import Example, TaskData, limited, select_tasks
from deal_core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder


class HubSource:
    """Tasks of the table ``[data.hub]``, in the order they are written there."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        self._config, self._unit_column = config, unit_column

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or every task of ``data.hub``.

        Raises:
            UserError: no task is defined, or an unknown one is named.
        """
        if not self._config.hub:
            raise UserError('data.source = "hub" needs a table [data.hub.TASK] with a path')
        return select_tasks(self._config.hub, self._config.tasks, "task in data.hub:")

    def load(self, task: str) -> TaskData:
        """Return a task. The label space is ``label_text`` in its order; without it the
        data set's own label names; without them the training labels, sorted; none where its answers
        are texts.

        Raises:
            UserError: unknown task, data set, configuration or split, a missing column, an
                empty text, or a label without text.
        """
        select_tasks(self._config.hub, (task,), "task in data.hub:")
        return limited(self._task(task, self._groups), self._config)

    @cached_property
    def _groups(self) -> tuple[str, ...]:
        return groups_of(self._config, map(self._task, self.task_names()))

    def _task(self, task: str, groups: tuple[str, ...] = ()) -> TaskData:
        spec = self._config.hub[task]
        columns = Columns.of(self._config, task, self._unit_column, spec)

        empty: list[UserError] = []

        def read(split: str) -> tuple[tuple[Example, ...], Mapping[str, str]]:
            rows, where = load_split(task, spec, split, columns), _where(task, spec, split)
            names = _label_names(spec, rows, columns.label)
            return tuple(_examples(rows, columns, names, where, empty)), names

        train, names = read(spec.train_split)
        labels = tuple(dict.fromkeys(name.strip() for name in names.values()))
        if columns.label and not labels:
            labels = tuple(sorted({example.label for example in train}))
        test, _ = read(spec.test_split)
        for row, example in enumerate(test, start=1):
            if columns.label and example.label not in labels:
                raise UserError(
                    f"{_where(task, spec, spec.test_split)}, row {row}: no training example has "
                    f"the label '{example.label}'; choose another test_split"
                )
        return TaskData(task, labels, train, test, groups, left_out=len(empty))


def _where(task: str, spec: HubTask, split: str) -> str:
    config = f"/{spec.config}" if spec.config else ""
    return f"data.hub.{task} ({spec.path}{config}, split {split})"


def _label_names(spec: HubTask, rows: Dataset, column: str) -> Mapping[str, str]:
    """Return what values of the label column stand for, in the order of the labels: those of
    ``label_text``, or of a ClassLabel column, whose values are indices; none: for themselves."""
    if not column or column not in rows.column_names:
        return {}
    names = getattr(rows.features[column], "names", ())
    return spec.label_text or {str(index): name for index, name in enumerate(names)}


def _examples(
    rows: Dataset, columns: Columns, names: Mapping[str, str], where: str, empty: list[UserError]
) -> Iterator[Example]:
    """Yield what can be used; rows without text or answer are added to the ``empty``."""
    names_there = rows.column_names
    known = columns.text in names_there or not {"messages", "instruction"} & {*names_there}
    if known:
        require_columns(names_there, columns, where)
        rows = rows.select_columns([each for each in names_there if each in vars(columns).values()])
    for number, values in enumerate(rows, start=1):
        row = shaped(values, columns)
        value = str(row.get(columns.label)).strip() if columns.label else ""
        if names and value not in names:  # of a withheld label it is -1
            raise UserError(
                f"{where}, row {number}: label '{value}' has no text (known: {', '.join(names)}); "
                "add it to label_text or choose another split"
            )
        try:
            yield to_example(row, columns, where, number, names)
        except EmptyRow as error:
            empty.append(error)


def load_split(task: str, spec: HubTask, split: str, columns: Columns) -> Dataset:
    """Return the rows of a task's split, its ``columns`` read as the texts that they are.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets
    from huggingface_hub import constants
    from pandas.errors import ParserWarning

    if not Path(spec.path).exists():
        reach_hub()
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        place = spec.path, spec.config or None
        options = csv_options(datasets.load_dataset_builder(*place), columns)
        with warnings.catch_warnings():
            # pandas would warn of a row with more fields than the header, and leave some out.
            warnings.simplefilter("error", ParserWarning)
            return datasets.load_dataset(*place, split=split, **options)
    # ValueError: unknown configuration or split, or no rows; OSError: not found, no connection;
    # RuntimeError: a loading script, which the library no longer runs; YAMLError: its card.
    except (
        *(ValueError, OSError, RuntimeError, YAMLError),
        datasets.exceptions.DatasetsError,
    ) as error:
        cause = None if isinstance(error, OSError) else error.__cause__
        reason = " ".join(str(cause or error).split())
        raise UserError(
            f"{_where(task, spec, split)}: cannot be loaded ({reason}); check path, config, split "
            "and the files themselves (quote fields that hold commas), and the connection"
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()


ROWS = 10**8
"""Read at once: in a part of a file a column of numbers may have no gap, and be of another type."""


def csv_options(builder: DatasetBuilder, columns: Columns) -> dict[str, Any]:
    """Return options under which no column is guessed; none for files of other kinds. Where the
    data set says what its columns are, that stands."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    if not isinstance(builder.config, CsvConfig):
        return {}
    if builder.config.features is not None or builder.info.features is not None:
        return {"index_col": False}
    names = columns.used().values()
    as_written = {"converters": dict.fromkeys(names, str), "na_filter": False}
    return {"index_col": False, **as_written, "chunksize": ROWS}


SECONDS = 8.0
"""For the hub's answer."""


def reach_hub() -> None:
    """Ask the hub once a process whether it is there. Where it gives no answer the libraries, which
    would try for minutes, go offline: they take what this machine has."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


@cache
def _answers(address: str) -> bool:
    try:
        urlopen(Request(address, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:
        return True
    except OSError as error:
        # Of a certificate the libraries judge, which may know others.
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True
