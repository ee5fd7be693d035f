"""Who a client is, where it keeps what, and what it says of a fault.

A fault is a code for the server, and all the rest for the site's own log: an exception's text may
hold private data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.gate import Asked, Refusal, require
from client.site_file import NODE_KEY, SiteFile, read_site, site_files
from client.state import RetainedMissing, folder_of
from deal_core.atomic_write import rotated
from deal_core.config.experiment import Experiment, RunConfig
from deal_core.config.file import EXPERIMENT, PACKAGE, as_text, from_run_config, run_name
from deal_core.data.source import named_tasks
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import Policy
from deal_core.secure_sum.messages import ProtocolError
from deal_core.wire.records import BLAMES

if TYPE_CHECKING:
    from client.runtime import ClientRuntime
    from deal_core.deal.interface import Phase
    from deal_core.lora.state import State
    from deal_core.privacy.interface import Site
    from deal_core.wire.instruction import Instruction

LOG = "log.jsonl"
"""The site's own log, in its state folder."""
STATUS = "status"
"""Record that says how a request ended; its ``code`` is ``ok``, or why there is nothing else."""
NOT_FOR_CLIENTS = ("out", "resume", "engine", "track")
"""Keys of ``[run]`` on which nothing that a client computes depends."""
OWN_RULES = (Refusal, RetainedMissing)
"""By which a site declines a request, or asks for it once more: nothing went wrong."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Client:
    """One client of a run."""

    number: int
    """In the run."""
    folder: Path
    """What it keeps of this run, between requests and restarts."""
    asked: Experiment
    """As the server asks for it."""
    file: SiteFile | None = None
    """What an institution has decided; None where the client is simulated."""

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment as it holds here.

        Raises:
            Refusal: it asks for what the site does not allow.
        """
        return self.asked if self.file is None else as_the_site_decides(self.asked, self.file)

    @property
    def simulated(self) -> bool:
        """Whether it is no institution's: its noise may be seeded."""
        return self.file is None

    @cached_property
    def policy(self) -> Policy | None:
        """The site's; None where it has none, or the client is simulated. Where peers are pinned
        the server vouches for none."""
        if self.file is None or self.file.policy is None:
            return None
        vouches = self.file.policy.server_vouches_for_peers and not self.file.peers
        return self.file.policy.model_copy(update={"server_vouches_for_peers": vouches})

    @cached_property
    def site(self) -> Site:
        """What a privacy mechanism must know of the client. An institution's ledger outlives all
        runs, and lies in its state folder; a simulated client's lies in its folder of the run."""
        from deal_core.privacy.interface import Site
        from deal_core.privacy.ledger import Ledger

        place = self.folder if self.file is None else Path(self.file.site.state)
        run = "" if self.file is None else self.run
        return Site(partial(Ledger, place), self.policy, self.simulated, run)

    @cached_property
    def run(self) -> str:
        """Whose run a request is of: its settings as they are asked for, which stay when the site
        changes its own file, and, at a site, the run's own name."""
        settings = run_name(self.asked)
        return settings if self.file is None else f"{settings} {self.folder.name}"

    @cached_property
    def settings(self) -> str:
        """The experiment as it is asked for, but for what no client computes with, as text."""
        plain = RunConfig()
        same = {name: getattr(plain, name) for name in NOT_FOR_CLIENTS}
        return as_text(self.asked.changed(run=same))

    @cached_property
    def kept(self) -> Path:
        """Folder of what methods keep in this run, of these very settings."""
        return folder_of(self.folder, "" if self.file is None else self.run)

    @cached_property
    def masked_only(self) -> bool:
        """Whether nothing that is learnt leaves but in a secure sum, by the site's policy."""
        return self.policy is not None and self.policy.secure_aggregation == "required"

    def as_of_today(self, request: str) -> str:
        """Return the name of a request under the policy of today: what was kept, or masked, under
        another one is no answer to it."""
        said = "" if self.policy is None else self.policy.model_dump_json()
        return f"{request} {hashlib.sha256(said.encode()).hexdigest()}"


@dataclass(frozen=True)
class ClientRequest:
    """One request as it was read: who answers, what is asked, and from which state."""

    client: Client
    runtime: ClientRuntime
    """Model, method and tokenised data of this process."""
    instruction: Instruction
    phase: Phase
    """Of the method, in which the request is."""
    state: State
    """The server's, as it arrived."""
    name: str = ""
    """Of all that is asked: the same is answered with the same."""
    masked: bool = False
    """Whether the answer leaves in a secure sum."""

    def asked(self, **known: Any) -> Asked:
        """Return what the gate judges, with what is ``known`` by now."""
        return Asked(
            self.runtime.experiment,
            self.client.policy,
            simulated=self.client.simulated,
            request=self.instruction,
            tasks=self.runtime.tasks,
            statistics=self.phase.statistics,
            **known,
        )


def file_of(context: Context) -> SiteFile | None:
    """Return ``site.toml``, None for a simulated client; a UserError where it cannot be used."""
    place = context.node_config.get(NODE_KEY)
    return None if place is None else read_site(Path(str(place)))


def client_of(context: Context, file: SiteFile | None) -> Client:
    """Return which client this is; ``file``: what :func:`file_of` returns of the context.

    Raises:
        Refusal: another federated-deal is installed here than at the server, the run does not know
            this site, or no folder can have its name.
    """
    text = str(context.run_config.get(EXPERIMENT, ""))
    if file is None:
        return _simulated(text, context.run_id, int(context.node_config["partition-id"]))
    asked = from_run_config({EXPERIMENT: text})
    package = str(context.run_config.get(PACKAGE, ""))[:64]
    require(Asked(asked, file=file, package=package), "package", "run")
    number, run = asked.federation.sites.index(file.site.name), Path(asked.run.out).name
    return Client(number, Path(file.site.state) / "runs" / run, asked, file)


@lru_cache(maxsize=64)
def _simulated(text: str, run_id: int, number: int) -> Client:
    asked = from_run_config({EXPERIMENT: text})
    out = Path(asked.run.out or f"deal-run-{run_id}")
    return Client(number, out / "sites" / str(number), asked)


def as_the_site_decides(experiment: Experiment, site: SiteFile) -> Experiment:
    """Return the experiment with everything that is the site's to say taken from ``site``: its
    files, tasks and labels, where the base model lies, the column that makes groups. Of the data
    that were asked for only which of the tasks are in the run is left.

    Raises:
        Refusal: the experiment needs a base model, or public texts, that the site has not agreed
            to; names a task, or labels, that it has not declared; or has another unit of
            privacy than the site's.
    """
    require(Asked(experiment, site.policy, site), "unit", "data", "model")
    asked, model = experiment.data, experiment.model
    tasks = asked.tasks or named_tasks(asked)
    data = {
        "tasks": tasks,
        "instructions": {t: asked.instructions[t] for t in tasks if t in asked.instructions},
        "measures": site.data.measures
        | {t: asked.measures[t] for t in tasks if t in asked.measures},
        "public_path": site.data.public_path if asked.public_path else "",
    }
    unit = site.policy.unit_column if site.policy is not None else ""
    threads = site.compute.threads or experiment.run.threads
    return experiment.model_copy(
        update={
            "data": site_files(site.data).model_copy(update=data),
            "model": model.model_copy(update={"name": site.models[model.name] or model.name}),
            "privacy": experiment.privacy.model_copy(update={"unit_column": unit}),
            "run": experiment.run.model_copy(update={"threads": threads}),
        }
    )


def write_log(file: SiteFile, event: str, message: Message | None = None, **fields: Any) -> None:
    """Append one event, about a request, to the site's own log, one JSON object a line, which is
    never sent. A log that cannot be written stops nothing: the line then goes to the output of the
    process."""
    if message is not None:
        records = message.content.config_records if message.has_content() else {}
        instruction: Mapping[str, Any] = records.get("instruction", {})
        known = ("task", "stage", "phase", "server_round")
        about = {key: str(instruction[key])[:100] for key in known if key in instruction}
        fields |= {"asked": message.metadata.message_type, **about}
    folder = Path(file.site.state)
    line = json.dumps({"event": event, "time": time.time(), **fields})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rotated(folder / LOG).open("a", encoding="utf-8") as book:
            book.write(line + "\n")
    except OSError:
        log.exception("the site's log cannot be written: %s", line)


def log_fault(message: Message, error: Exception, file: SiteFile | None, client: object) -> str:
    """Return the fixed word for a fault, or for a client's own refusal (a policy, a budget, no
    data), which is all that leaves; the log here has the rest: of a refusal the reason, of what
    went wrong all that is known. A simulated client, which has no ``file``, is known by number."""
    code = "failed"
    if isinstance(error, PayloadError):
        code = "refused"
    elif isinstance(error, (Refusal, ProtocolError, RetainedMissing)):
        code = error.code
    if file is not None:
        about: dict[str, Any] = {"reason": str(error)}
        if not isinstance(error, OWN_RULES):
            told = "".join(traceback.format_exception(error))
            about = {"error": f"{type(error).__name__}: {error}", "traceback": told}
        write_log(file, f"request_{code}", message, **about)
    elif code in ("failed", "refused"):
        log.error("request answered with '%s'", code, exc_info=error)
    else:
        log.info("client %s takes no part (%s): %s", client, code, error)
    return code


def status_reply(message: Message, code: str, blamed: str = "") -> Message:
    """Return a reply that carries a code and nothing else; where a site's message of a secure sum
    is to blame, whose: that follows from what the sites have sent, and from no record."""
    status = ConfigRecord({"code": code, **({BLAMES: blamed} if blamed else {})})
    return Message(RecordDict({STATUS: status}), reply_to=message)
