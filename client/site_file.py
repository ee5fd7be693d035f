"""What the site decides, whatever the server asks: its data, columns, labels, models and device.

``site.toml`` lies at the site, and names everything that the server must not: the server knows
tasks and labels, never a path or a column.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from deal_core.config.data import DataConfig, Labels, Table, TaskColumns
from deal_core.config.experiment import Experiment, ModelConfig
from deal_core.config.file import parse_tables, read_toml
from deal_core.data.source import named_tasks
from deal_core.errors import UserError, at_home
from deal_core.privacy.policy import OutsidePolicy, Policy, require_unit

NODE_KEY = "site"
"""Key of Flower's node config with the path of ``site.toml``; simulated clients have none."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a site, and of a run: both become names of files and folders."""


def a_fingerprint(text: str) -> str:
    """Return the text, if it is the fingerprint of a key, as ``deal site init`` prints it.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", text):
        raise ValueError(
            f"'{text[:80]}' is no fingerprint; write what deal site check prints at that site, "
            "SHA256: and 43 characters"
        )
    return text


Fingerprint = Annotated[str, AfterValidator(a_fingerprint)]


class Identity(Table):
    """Who the site is."""

    name: str
    """As the server has registered it."""
    state: str = "state"
    """Folder of what must last: ledger, log, what methods keep. Relative to ``site.toml``."""


class Connection(Table):
    """Where the server is, and how it is known."""

    address: str
    """``host:port`` of the server."""
    certificate: str = "ca.crt"
    """Certificate of the authority that has signed the server's; relative to ``site.toml``."""
    key: str = "site.key"
    """The site's private key; it never leaves, and only its owner may read it."""


class SiteData(Table):
    """The site's own files: ``path/TASK/{train,test}.{jsonl,csv,tsv,parquet,xlsx}``."""

    path: str
    """Folder that holds one folder per task; relative to ``site.toml``."""
    split: float = Field(0.0, ge=0, lt=1)
    """About this share of a training file is for testing, where there is no test file; each record
    by itself; 0: a test file is needed."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str = ""
    """Second text column, joined to the first; empty: none."""
    label_column: str = "label"
    """Column of the label."""
    target_column: str = "target"
    """Column of the answer, where it is a text."""
    references_column: str = ""
    """Column of further right answers; empty: none."""
    id_column: str = ""
    """Column that says whose record it is (a patient's number); ``policy.disjoint_tasks`` needs it,
    or ``policy.unit_column``."""
    cache_tokens: bool = False
    """Keep token ids, which are the texts in another form, in the user's cache folder."""
    public_path: str = ""
    """File of public texts, for experiments that name some (``data.public_path``)."""
    files: dict[str, TaskColumns] = Field({})
    """Task name to its own columns, and to what its label values stand for."""
    labels: dict[str, Labels] = Field({})
    """Task name to its labels, as the consortium has agreed on: the site takes part in these tasks
    alone, under these labels. No labels, ``TASK = []``: the answers are texts."""
    instructions: dict[str, str] = Field({})
    """Task name to what the prompt of a generating model asks for, as agreed on: an experiment with
    other words is refused. A task that is not named takes the experiment's."""


class Compute(Table):
    """What the site lends."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda|cuda:[0-9]+)$")
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: int = Field(0, ge=0)
    """Torch threads; 0: what the experiment asks for."""
    keep_seconds: int = Field(900, ge=0)
    """How long the model stays in memory after a request, for the next one; 0: it does not."""


class SiteFile(Table):
    """``site.toml``."""

    site: Identity
    server: Connection
    data: SiteData
    compute: Compute = Compute()
    models: dict[str, str] = Field({"embedded:minilm": "", "embedded:smollm2": ""})
    """Base models that the site accepts, by the experiment's name, each with the folder where it
    lies here; empty: the name itself."""
    peers: dict[str, Fingerprint] = Field({})
    """Name of another site to the fingerprint of its key, which ``deal site init`` shows there: the
    sites with which secure sums are made. Compare it by telephone."""
    policy: Policy | None = None
    """Limits that no experiment can widen; without the table the site does what is asked."""


def read_site(path: Path) -> SiteFile:
    """Return ``site.toml``, read and checked; every path in it is absolute.

    Raises:
        UserError: unreadable, an unknown key, a wrong type, a name that is none, or disjoint tasks
            of records that nobody can tell apart.
    """
    site = parse_tables(SiteFile, read_toml(path), str(path))
    if not NAME.fullmatch(site.site.name):
        raise UserError(
            f"{path}: site.name '{site.site.name}' should be letters, digits, '.', '_' and '-', "
            "at most 64"
        )
    _require_ids(site, path)
    return _absolute(site, path.parent)


def _require_ids(site: SiteFile, path: Path) -> None:
    """Check that whoever declares disjoint tasks says whose a record is: two people may have the
    same text, and whether they do would decide which tasks the site refuses.

    Raises:
        UserError: no column says it.
    """
    policy = site.policy
    if policy and policy.disjoint_tasks and not (site.data.id_column or policy.unit_column):
        raise UserError(
            f"{path}: policy.disjoint_tasks compares whose the records are, and no column says "
            "it; set data.id_column (or policy.unit_column), or leave disjoint_tasks out"
        )


def _absolute(site: SiteFile, base: Path) -> SiteFile:
    def at(name: str) -> str:
        return str((base / at_home(name)).resolve()) if name else ""

    server, data = site.server, site.data
    paths = {"certificate": at(server.certificate), "key": at(server.key)}
    own = {"path": at(data.path), "public_path": at(data.public_path)}
    return site.model_copy(
        update={
            "site": site.site.model_copy(update={"state": at(site.site.state)}),
            "server": server.model_copy(update=paths),
            "data": data.model_copy(update=own),
            "models": {name: at(place) for name, place in site.models.items()},
        }
    )


def as_the_site_decides(experiment: Experiment, site: SiteFile) -> Experiment:
    """Return the experiment with everything that is the site's to say taken from ``site``.

    Raises:
        OutsidePolicy: the experiment needs a base model, or public texts, that the site has not
            agreed to; names a task, or labels, that it has not declared; or has another unit of
            privacy than the site's.
    """
    unit = require_unit(experiment.privacy.unit_column, site.policy)
    privacy = experiment.privacy.model_copy(update={"unit_column": unit})
    model = agreed_model(experiment, site)
    run = experiment.run.model_copy(
        update={"threads": site.compute.threads or experiment.run.threads}
    )
    tables = {"data": own_data(experiment.data, site.data), "model": model}
    return experiment.model_copy(update={**tables, "privacy": privacy, "run": run})


def agreed_model(experiment: Experiment, site: SiteFile) -> ModelConfig:
    """Return the base model, where it lies at the site.

    Raises:
        OutsidePolicy: the site has not agreed to it.
    """
    model = experiment.model
    if model.name not in site.models:
        raise OutsidePolicy(
            f"[models] of site.toml does not name '{model.name}'; add it to accept it"
        )
    return model.model_copy(update={"name": site.models[model.name] or model.name})


def own_data(asked: DataConfig, site: SiteData) -> DataConfig:
    """Return the site's files, tasks and labels; of what was asked only which of the tasks are in
    the run is left.

    Raises:
        OutsidePolicy: a task that the site has not declared, or with other labels, another kind of
            answer, or another instruction.
    """
    tasks = asked.tasks or named_tasks(asked)
    for task in tasks:
        declared = site.labels.get(task)
        if declared is None or declared != asked.labels.get(task, declared):
            what = "is not in" if declared is None else "has other labels than in"
            raise OutsidePolicy(
                f"task '{task[:80]}' {what} [data.labels] of site.toml; if the consortium has "
                "agreed on it, add the lines that deal site check --experiment FILE prints"
            )
        if (task in asked.generation) != (not declared):
            kind = "texts" if declared == () else "labels"
            raise OutsidePolicy(
                f"task '{task[:80]}': its answers are {kind} by [data.labels] of site.toml, and "
                "others by data.generation of the experiment"
            )
        words = asked.instructions.get(task, "")
        if site.instructions.get(task, words) != words:
            raise OutsidePolicy(
                f"task '{task[:80]}' has another instruction than in [data.instructions] of "
                "site.toml"
            )
    if asked.public_path and not site.public_path:
        raise OutsidePolicy("the experiment needs public texts; set data.public_path in site.toml")
    instructions = {task: asked.instructions[task] for task in tasks if task in asked.instructions}
    return site_files(site).model_copy(
        update={
            "tasks": tasks,
            "instructions": instructions,
            "measures": asked.measures,
            "public_path": site.public_path if asked.public_path else "",
        }
    )


def site_files(site: SiteData) -> DataConfig:
    """Every declared task of the site, as its own files and columns say."""
    return DataConfig(
        source="site",
        path=site.path,
        split=site.split,
        text_column=site.text_column,
        pair_column=site.pair_column,
        label_column=site.label_column,
        target_column=site.target_column,
        references_column=site.references_column,
        id_column=site.id_column,
        cache_tokens=site.cache_tokens,
        files=site.files,
        labels=site.labels,
        generation=tuple(task for task, labels in site.labels.items() if not labels),
        instructions=site.instructions,
    )
