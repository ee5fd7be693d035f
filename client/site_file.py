"""``site.toml``: what the site decides, whatever the server asks. It names everything that the
server must not: the server knows tasks and labels, never a path or a column."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from deal_core.config.data import DataConfig, Labels, MeasureName, Table, TaskColumns
from deal_core.config.experiment import Device
from deal_core.config.file import parse_tables, read_toml
from deal_core.errors import UserError, at_home
from deal_core.privacy.policy import Policy

NODE_KEY = "site"
"""Key of Flower's node config with the path of ``site.toml``; simulated clients have none."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a site, and of a run: both become names of files and folders."""


def _fingerprint(text: str) -> str:
    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", text):
        raise ValueError(
            f"'{text[:80]}' is no fingerprint; write what deal site check prints at that site, "
            "SHA256: and 43 characters"
        )
    return text


Fingerprint = Annotated[str, AfterValidator(_fingerprint)]


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
    id_column: str = ""
    """Column that says whose record it is (a patient's number); ``policy.disjoint_tasks`` needs it,
    or ``policy.unit_column``."""
    public_path: str = ""
    """File of public texts, for experiments that name some (``data.public_path``)."""
    files: dict[str, TaskColumns] = Field({})
    """Task name to its own columns, and to what its label values stand for."""
    labels: dict[str, Labels] = Field({})
    """Task name to its labels, as the consortium has agreed on: the site takes part in these tasks
    alone, under these labels. No labels, ``TASK = []``: the answers are texts."""
    measures: dict[str, MeasureName] = Field({})
    """Task name to ``entity-f1``: its rows are words and their tags, as agreed on."""
    instructions: dict[str, str] = Field({})
    """Task name to what the prompt of a generating model asks for, as agreed on: an experiment with
    other words is refused. A task that is not named takes the experiment's."""


class Compute(Table):
    """What the site lends."""

    device: Device = "auto"
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
    models: dict[str, str] = Field(
        {"embedded:minilm": "", "embedded:mpnet": "", "embedded:smollm2": ""}
    )
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
    # two people may have the same text: whether they do would decide which tasks the site refuses
    policy = site.policy
    if policy and policy.disjoint_tasks and not (site.data.id_column or policy.unit_column):
        raise UserError(
            f"{path}: policy.disjoint_tasks compares whose the records are, and no column says "
            "it; set data.id_column (or policy.unit_column), or leave disjoint_tasks out"
        )
    return _absolute(site, path.parent)


def _absolute(site: SiteFile, base: Path) -> SiteFile:
    def at(name: str) -> str:
        return str((base / at_home(name)).resolve()) if name else ""

    def placed(table: Table, *names: str) -> Table:
        return table.model_copy(update={name: at(getattr(table, name)) for name in names})

    return site.model_copy(
        update={
            "site": placed(site.site, "state"),
            "server": placed(site.server, "certificate", "key"),
            "data": placed(site.data, "path", "public_path"),
            "models": {name: at(place) for name, place in site.models.items()},
        }
    )


def site_files(site: SiteData) -> DataConfig:
    """Return every declared task of the site, as its own files and columns say."""
    texts = tuple(task for task, labels in site.labels.items() if not labels)
    own = {name: getattr(site, name) for name in SiteData.model_fields if name != "public_path"}
    return DataConfig(source="site", generation=texts, **own)
