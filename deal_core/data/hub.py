"""Any data set that ``datasets.load_dataset`` can read: the hub, or a local folder.

Whether the hub can be reached is asked once, before a library that would try for minutes. CSV files
are read as what is written there: pandas, which reads them for the library, guesses: a code ``01``
becomes the number 1, a text ``NA`` nothing, and where all rows have a field more than the header
the first one becomes the name of the row, and is lost.
"""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from yaml import YAMLError

from deal_core.config.data import DataConfig, HubTask
from deal_core.data.rows import Columns, group_column, require_columns, to_example
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
        spec = self._config.hub[task]
        columns = self._columns(task)
        train_rows = load_split(task, spec, spec.train_split, columns)
        train = tuple(self._examples(task, spec.train_split, train_rows))
        labels = _label_space(spec, train_rows, columns.label, train) if columns.label else ()
        test_rows = load_split(task, spec, spec.test_split, columns)
        test = tuple(self._examples(task, spec.test_split, test_rows))
        for row, example in enumerate(test, start=1):
            if columns.label and example.label not in labels:
                raise UserError(
                    f"{_where(task, spec, spec.test_split)}, row {row}: no training example has "
                    f"the label '{example.label}'; choose another test_split"
                )
        return limited(TaskData(task, labels, train, test, self._groups), self._config)

    def _columns(self, task: str) -> Columns:
        return Columns.of(self._config, task, self._unit_column, self._config.hub[task])

    def _examples(self, task: str, split: str, rows: Dataset) -> Iterator[Example]:
        spec = self._config.hub[task]
        columns, where = self._columns(task), _where(task, spec, split)
        require_columns(rows.column_names, columns, where)
        name_label = _label_namer(spec, rows, columns.label) if columns.label else None
        wanted = [column for column in rows.column_names if column in vars(columns).values()]
        for number, row in enumerate(rows.select_columns(wanted), start=1):
            if name_label is not None:
                row = {**row, columns.label: name_label(row[columns.label], where, number)}
            yield to_example(row, columns, where, number)

    @cached_property
    def _groups(self) -> tuple[str, ...]:
        column = group_column(self._config)
        if not column:
            return ()
        found: set[str] = set()
        for task in self.task_names():
            spec = self._config.hub[task]
            for split in (spec.train_split, spec.test_split):
                rows = load_split(task, spec, split, self._columns(task))
                found.update(example.group for example in self._examples(task, split, rows))
        return tuple(sorted(found))


def _where(task: str, spec: HubTask, split: str) -> str:
    config = f"/{spec.config}" if spec.config else ""
    return f"data.hub.{task} ({spec.path}{config}, split {split})"


def load_split(task: str, spec: HubTask, split: str, columns: Columns) -> Dataset:
    """Return the rows of a task's split.

    Args:
        task: its name.
        spec: where it lies.
        split: which.
        columns: that are read, as the texts that they are.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets
    from pandas.errors import ParserWarning

    cure = "check path, config and split, and the connection to the hub"
    is_local = Path(spec.path).exists() or has_data_set(spec.path)
    if not is_local and not hub_answers():
        raise UserError(f"{_where(task, spec, split)}: cannot be loaded ({no_answer()}); {cure}")
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
        cause = error.__cause__
        if isinstance(cause, ParserWarning):
            reason = "a row has more fields than the header: quote fields that hold commas"
        else:
            reason = " ".join(str(cause or error).split())
        cure = "mend the files, or choose others" if cause is not None else cure
        if isinstance(error, RuntimeError):
            cure = "choose a data set of plain files, or save it as such"
        raise UserError(
            f"{_where(task, spec, split)}: cannot be loaded ({reason}); {cure}"
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _class_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """Return the names of a ClassLabel column; empty for any other column."""
    return tuple(getattr(rows.features[column], "names", ()))


def _label_namer(spec: HubTask, rows: Dataset, column: str) -> Callable[[Any, str, int], Any]:
    names = _class_names(rows, column)
    # ClassLabel values are indices; -1 is how withheld test labels are spelled.
    known: Mapping[str, str] = spec.label_text or {str(i): name for i, name in enumerate(names)}

    def name_label(value: Any, where: str, number: int) -> Any:
        if not known:
            return value
        if str(value) not in known:
            listed = ", ".join(known)
            raise UserError(
                f"{where}, row {number}: label '{value}' has no text (known: {listed}); "
                "add it to label_text or choose another split"
            )
        return known[str(value)]

    return name_label


def _label_space(
    spec: HubTask, rows: Dataset, column: str, train: tuple[Example, ...]
) -> tuple[str, ...]:
    declared = tuple(spec.label_text.values()) or _class_names(rows, column)
    # Labels of rows have no blanks around them either.
    stripped = dict.fromkeys(name.strip() for name in declared)
    return tuple(stripped) or tuple(sorted({e.label for e in train}))


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
    names = [name for name in vars(columns).values() if name]
    as_written = {"converters": dict.fromkeys(names, str), "na_filter": False}
    return {"index_col": False, **as_written, "chunksize": ROWS}


SECONDS = 8.0
"""For the hub's answer."""


def hub_answers() -> bool:
    """Return whether the hub answers, whatever it says; False where ``HF_HUB_OFFLINE`` is set. It
    is asked once a process."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


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


def has_data_set(name: str) -> bool:
    """Return whether a data set of the hub is in this machine's cache, in some form."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, slash, own = name.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(own)}" if slash else camelcase_to_snakecase(own)
    return (Path(config.HF_DATASETS_CACHE) / folder).is_dir()


def no_answer() -> str:
    """Return the reason in words."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not on this machine, and HF_HUB_OFFLINE is set"
    return f"not on this machine, and {constants.ENDPOINT} gives no answer"
