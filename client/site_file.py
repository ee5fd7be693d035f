"""What the site decides, whatever the server asks: its data, columns, labels, models and device;
and its log.

``site.toml`` lies at the site, and names everything that the server must not: the server knows
tasks and labels, never a path or a column.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from deal_core.config.data import DataConfig, Labels, Table, TaskColumns
from deal_core.config.file import parse_tables, read_toml
from deal_core.errors import UserError, at_home
from deal_core.privacy.policy import Policy

NODE_KEY = "site"
"""Key of Flower's node config with the path of ``site.toml``; simulated clients have none."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a site, and of a run: both become names of files and folders."""
LOG = "log.jsonl"
"""The site's own log, in its state folder."""
log = logging.getLogger(__name__)


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
        files=site.files,
        labels=site.labels,
        generation=tuple(task for task, labels in site.labels.items() if not labels),
        instructions=site.instructions,
    )


@dataclass(frozen=True)
class SiteLog:
    """The site's own log, one JSON object a line; it is never sent.

    Attributes:
        folder: in which it lies; made when first needed.
    """

    folder: Path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. A log that cannot be written stops nothing: the line then goes to
        the output of the process."""
        line = json.dumps({"event": event, "time": time.time(), **fields})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            log.exception("the site's log cannot be written: %s", line)

    def refusal(self, event: str, error: BaseException, **fields: Any) -> None:
        """Append what the site has declined by its own rules: the reason, and no traceback, since
        nothing went wrong."""
        self.write(event, reason=str(error), **fields)

    def fault(self, event: str, error: BaseException, **fields: Any) -> None:
        """Append what went wrong, with all that is known of it."""
        told = "".join(traceback.format_exception(error))
        self.write(event, error=f"{type(error).__name__}: {error}", traceback=told, **fields)
