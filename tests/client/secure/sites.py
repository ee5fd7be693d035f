"""Real sites that pin each other's keys, and a server that is real but for the wire between."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from client.resident_worker import INSIDE
from client.site_file import NODE_KEY
from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, from_run_config, parse_experiment
from deal_core.privacy.ledger import Ledger
from simulations.deployment.keys import KeyPair, fingerprint_of_line, make_key_pair, write_secret
from simulations.engines.inprocess import FIRST_CLIENT_NODE, InProcessGrid
from tests.client.real_site import LABELS, rows
from tests.run_configs import placed
from tests.simulations.run.secure_runs import exchange_of
from tests.sizes import TWO_LAYERS

NAMES = ("north", "south", "west", "east")
TASK = "surgery"
RUN = "run"
OPEN = 'metrics = "none"\nmin_records = 1\nsecure_aggregation = "required"\n'
"""A policy under which a site trains without noise, and lets a masked update leave alone."""


@dataclass(frozen=True)
class SecureSite:
    """Attributes: ``folder`` with ``site.toml``, ``name``, ``pair`` of keys."""

    folder: Path
    name: str
    pair: KeyPair

    @property
    def fingerprint(self) -> str:
        return fingerprint_of_line(self.pair.public.decode())

    @property
    def state(self) -> Path:
        """What it keeps of the run."""
        return self.folder / "state" / "runs" / RUN

    def write(self, peers: Mapping[str, str], policy: str = OPEN) -> None:
        """Decide: whom it knows, and its policy."""
        pinned = "".join(f'"{name}" = "{shown}"\n' for name, shown in peers.items())
        (self.folder / "site.toml").write_text(
            f'[site]\nname = "{self.name}"\n[server]\naddress = "127.0.0.1:1"\n'
            f'[data]\npath = "data"\n[data.labels]\n{TASK} = {json.dumps(list(LABELS[TASK]))}\n'
            f'[compute]\ndevice = "cpu"\nthreads = 1\n[peers]\n{pinned}'
            f"[policy]\n{TWO_LAYERS.removeprefix('adapter.')}\n{policy}"
        )

    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "state" / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def errors(self) -> list[str]:
        """What its log says was refused or went wrong, one line each; counts that stay apart."""
        said = [event for event in self.log() if event["event"] != "request_withheld"]
        return [event[key] for event in said for key in ("error", "reason") if key in event]

    def trained(self) -> bool:
        """Whether anything was learnt, charged or noted."""
        return bool(list(self.state.glob("update-*")) or Ledger(self.folder / "state").events())


def make_sites(path: Path, names: Sequence[str] = NAMES, policy: str = OPEN) -> list[SecureSite]:
    """Sites that all know each other."""
    sites = []
    for number, name in enumerate(names):
        folder = path / name
        for split in ("train", "test"):
            file = folder / "data" / TASK / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            own = rows(TASK, 8 + 4 * number)
            lines = [json.dumps({"text": f"{name} {text}", "label": label}) for text, label in own]
            file.write_text("\n".join(lines) + "\n")
        pair = make_key_pair(name)
        write_secret(folder / "site.key", pair.private)
        sites.append(SecureSite(folder, name, pair))
    for site in sites:
        site.write(pins(sites, site), policy)
    return sites


def pins(sites: Sequence[SecureSite], own: SecureSite) -> dict[str, str]:
    """The others, as one of them should pin them."""
    return {site.name: site.fingerprint for site in sites if site is not own}


def asked_for(*overrides: str) -> Experiment:
    """One task, short rounds, masked updates, of the four sites."""
    given = [
        "data.source=sites",
        f"federation.sites={json.dumps(NAMES)}",
        f"federation.clients={len(NAMES)}",
        "federation.rounds=2",
        "federation.deadline_seconds=60",
        "federation.quorum=0.5",
        "train.batch_size=8",
        "train.max_length=8",
        "train.precision=float32",
        "adapter.retained_rank=8",
        "run.engine=deployment",
        "run.threads=1",
        "aggregation.secure=true",
        "aggregation.rule=ffa",
        "method.prototype.enabled=off",
        TWO_LAYERS,
        *overrides,
    ]
    tables = apply_overrides({}, given)
    tables["data"] = {**tables["data"], "labels": {TASK: list(LABELS[TASK])}}
    return parse_experiment(tables, "test")


class SiteGrid(InProcessGrid):
    """To real sites: each request goes to the app of one, with its own ``site.toml``.

    What is asked is kept in ``asked``: exchange and site's number -> message; ``tamper`` may change
    it on its way.
    """

    def __init__(self, *arguments: Any, sites: Sequence[SecureSite]) -> None:
        super().__init__(*arguments)
        self.sites = sites
        self.asked: dict[tuple[str, int], Message] = {}

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=FIRST_CLIENT_NODE + k, name=site.name, public_key=_pem(site))
            for k, site in enumerate(self.sites)
        ]

    def tamper(self, exchange: str, number: int, request: Message) -> None:
        """Change a request: a server that is not honest."""

    def _execute(self, request: Message) -> Message:
        number = request.metadata.dst_node_id - FIRST_CLIENT_NODE
        self.asked[exchange_of(request), number] = request
        self.tamper(exchange_of(request), number, request)
        return super()._execute(request)

    def _context(self, node: int) -> Context:
        site = self.sites[node - FIRST_CLIENT_NODE]
        own = {NODE_KEY: str(site.folder / "site.toml"), INSIDE: True}
        config = placed(from_run_config(self._run_config), f"/srv/{RUN}")
        return Context(1, node, own, RecordDict(), config)


def grid_of(sites: Sequence[SecureSite], kind: type[SiteGrid] = SiteGrid) -> Any:
    """For :func:`tests.simulations.run.secure_runs.rounds`."""
    return partial(kind, sites=sites)


def _pem(site: SecureSite) -> bytes:
    key = serialization.load_ssh_public_key(site.pair.public)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, spki)
