"""Sources of tasks, and the data of one task as a run's clients have it, before it is divided among
them; public texts, which are no client's own. No adapter, no training.

A source is a class and a line in ``SOURCES``.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment
from deal_core.data.embedded import asset_folder
from deal_core.data.embedded_tasks import EmbeddedTasks, by_hash
from deal_core.data.files import FilesSource, SiteSource
from deal_core.data.given import GIVEN, GivenTasks
from deal_core.data.hub import HubSource
from deal_core.data.rows import Columns, to_text
from deal_core.data.source import DataSource as DataSource
from deal_core.data.source import Example as Example
from deal_core.data.source import TaskData as TaskData
from deal_core.data.source import declared_labels as declared_labels
from deal_core.data.source import (
    each_by_itself,
    named_tasks,
    select_tasks,
    split_off_each,
    stratified,
)
from deal_core.data.tables import READERS, read_lines, read_table
from deal_core.errors import UserError, at_home, choose


class SitesSource:
    """Data of real deployments stay at the sites; tasks and labels, which the experiment names, are
    shared. Columns are a matter of the sites."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or every task of ``data.labels`` and ``data.generation``.

        Raises:
            UserError: there is none, or one is named that is in neither.
        """
        known = named_tasks(self._config)
        if not known:
            raise UserError(
                'data.source = "sites" needs [data.labels] with TASK = ["label", ...]: sites that '
                "cannot see each other's data must agree on the labels beforehand (tasks whose "
                "answers are texts: data.generation)"
            )
        return select_tasks(known, self._config.tasks, "task in data.labels or data.generation:")

    def load(self, task: str) -> TaskData:
        """Raise :class:`UserError`: there is nothing to read here."""
        raise UserError(
            f"task '{task}': data.source = \"sites\" is data that only the sites have; start the "
            'run with deal submit, or use data.source = "files" to simulate'
        )


SOURCES: dict[str, Callable[[DataConfig, str], DataSource]] = {
    "medmcqa": EmbeddedTasks,
    "embedded": EmbeddedTasks,
    "files": FilesSource,
    "hub": HubSource,
    "sites": SitesSource,
    "site": SiteSource,
}
"""``data.source`` to source. Heavy libraries load when a source reads, not here."""


def open_source(config: DataConfig, unit_column: str = "") -> DataSource:
    """Return the source that ``data.source`` names; reads nothing yet. ``unit_column`` is
    ``privacy.unit_column``, which every row must have; empty: none.

    Raises:
        UserError: unknown source, the message lists the known ones; or one without columns.
    """
    if config.source.startswith(GIVEN):
        return GivenTasks(config, unit_column)
    return choose("data.source", config.source, SOURCES, "sources")(config, unit_column)


def public_labels(config: DataConfig, task: str) -> tuple[str, ...]:
    """Return the label space of a task, none where its answers are texts. Where it is declared no
    data are read.

    Raises:
        UserError: the labels are in data that cannot be read.
    """
    declared = declared_labels(config, task)
    return open_source(config).load(task).labels if declared is None else declared


def load_for_clients(experiment: Experiment, task: str) -> TaskData:
    """Return a task's data within the experiment's limits.

    Where single records are protected, ``data.max_train`` takes about so many: whether a record is
    one of them depends on that record alone. A subset of exactly so many would be another one, with
    other records in it, for a neighbouring data set. Where groups are protected it depends on the
    name of the group alone: a group is there whole, or not. So it is with ``data.split``.

    Raises:
        UserError: see :meth:`~deal_core.data.source.DataSource.load`.
    """
    data, privacy = experiment.data, experiment.privacy
    if privacy.mechanism != "record":
        return open_source(data, privacy.unit_column).load(task)
    unlimited = data.model_copy(update={"max_train": 0, "max_test": 0})
    whole = open_source(unlimited, privacy.unit_column).load(task)
    train, test = whole.train, whole.test
    if whole.held_out:
        train, test = split_off_each((*train, *test), data.split)
    if data.max_train:
        train = each_by_itself(train, task, data.max_train / max(1, len(train)))
    return replace(whole, train=train, test=stratified(test, data.max_test))


def client_names(experiment: Experiment) -> list[str]:
    """Return the names of a run's clients, by their numbers: those of the sites, or the values of
    the partition column where each of them is one client; empty: clients have numbers alone."""
    data, federation = experiment.data, experiment.federation
    if federation.sites or data.partition.kind != "column" or data.source == "sites":
        return list(federation.sites)
    source = open_source(data, experiment.privacy.unit_column)
    groups = source.load(source.task_names()[0]).groups
    return list(groups) if len(groups) == federation.clients else []


def public_texts(config: DataConfig, labels: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return public texts: of the file ``data.public_path``; else embedded ones, none of which is a
    text of an embedded task; where these are not installed, the names of all ``labels``.

    Raises:
        UserError: as :func:`read_public`.
    """
    if config.public_path:
        return tuple(read_public(config.public_path, config))
    try:
        return embedded_texts(asset_folder("public"))
    except UserError:
        return tuple(dict.fromkeys(name for names in labels for name in names))


def read_public(name: str, config: DataConfig) -> list[str]:
    """Return the texts of a file in its order, each once: of a table those in ``data.text_column``
    (and ``data.pair_column``), of any other file one a line.

    Raises:
        UserError: no such file, no text in it, or a row that cannot be read.
    """
    path = at_home(name)
    if not path.is_file():
        raise UserError(
            f"data.public_path: {path}: no such file; every client needs it at this path"
        )
    texts = list(dict.fromkeys(_texts(path, config)))
    if not texts:
        raise UserError(f"{path}: holds no texts; add some or choose another data.public_path")
    return texts


def _texts(path: Path, config: DataConfig) -> list[str]:
    if path.suffix.lower() not in READERS:
        return [text for _, text in read_lines(path)]
    columns, texts = Columns.of(config, ""), []
    for number, row in read_table(path):
        try:
            texts.append(to_text(row, columns))
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    return texts


@lru_cache(maxsize=1)
def embedded_texts(folder: Path) -> tuple[str, ...]:
    """Return embedded public texts, the same on every machine: questions of medical exams, of
    patients, on papers' abstracts, and of all kinds."""
    wanted = {
        ("MMLU/clinical.jsonl", "question", "options"): 450,
        ("healthsearchqa/test.jsonl", "question", ""): 250,
        ("PubMedQA/pqaa/test.jsonl", "question", ""): 250,
        ("BoolQ/combined.jsonl", "question", ""): 250,
        ("CommonsenseQA/validation.jsonl", "question", ""): 150,
        ("SIQA/test.jsonl", "passage", "question"): 150,
    }
    texts: list[str] = []
    for (name, first, second), number in wanted.items():
        rows = map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())
        found = {" ".join(f"{row[first]} {row.get(second, '')}".split()) for row in rows}
        texts += sorted(found, key=by_hash)[:number]
    return tuple(texts)


@lru_cache(maxsize=4)
def texts_digest(texts: tuple[str, ...]) -> str:
    """Return a digest of public texts, hexadecimal: sites of a sum must have the same."""
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(hashlib.sha256(text.encode()).digest())
    return hashed.hexdigest()
