"""``deal site init``: a key pair, and a ``site.toml`` that says what the site lends."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client.site_file import NAME
from deal_core.config.experiment import Experiment, ModelConfig
from deal_core.data.sources import SitesSource
from deal_core.data.tables import READERS
from deal_core.errors import UserError
from simulations.deployment.keys import fingerprint_of_line, make_key_pair, write_secret
from simulations.deployment.programs import filled, service_unit
from simulations.output.files import toml_value

POLICY = """\
mechanism = "record"     # differential privacy for each record; without this and max_epsilon,
                         # updates leave as the experiment asks, also unprotected
max_epsilon = 8.0        # of all that the ledger holds, for ever; a larger one protects less
# unit_column = "patient_id"  # whose a record is: all records of one are then protected together,
                         # in experiments alone that say so too; once and for all
metrics = "none"         # counts of right answers stay; "noised": they leave with noise, and are
                         # charged; "summed": as part of a secure sum alone; "clear": as they are
share_num_examples = false  # true: the exact number of training records may leave
share_sums = false       # true: class sums may leave with noise that is not charged; under
                         # differential privacy they leave anyway, with its noise, and are charged
spending = true          # false: epsilon and delta of the ledger stay here as well
secure_aggregation = "allowed"  # "required": an update leaves in a secure sum, or not at all
min_cohort = 3           # fewest sites in a secure sum; the number of all: no sum leaves one out
colluding = 1            # so many other sites may work with the server, and learn nothing more
# noise_share = "sum"    # the noise that protects a record may be made by all sites of a secure
                         # sum together; else all of it is made here
"""
"""Keys of ``[policy]`` in a new ``site.toml``: differential privacy, and nothing in the clear."""
LABELS = """\
[data.labels]            # every task that this site takes part in, and its labels, as agreed on
{lines}"""
NO_LABELS = """\
# Without [data.labels] the site takes part in no task. Add every task that it does take part in,
# with its labels, as the consortium has agreed on; deal site check --experiment prints the lines.
# [data.labels]
# TASK = ["label", "other label"]
"""


@dataclass(frozen=True)
class SiteRequest:
    """The arguments of ``deal site init``; ``labels`` and base ``model`` are those of the agreed
    experiment, and ``policy`` the keys of its table, as TOML."""

    folder: Path
    data: Path
    name: str
    address: str = "SERVER:9443"
    certificate: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    model: str = ModelConfig().name
    policy: str = POLICY


def init_site(request: SiteRequest) -> list[str]:
    """Fill the folder.

    Returns:
        The lines to print.

    Raises:
        UserError: a site is there already, a name or an address that is none, no such data, or
            the folder cannot be written.
    """
    folder = request.folder
    if not NAME.fullmatch(request.name):
        raise UserError(f"--name {request.name}: use letters, digits, '.', '_' and '-', up to 64")
    host_and_port(request.address, "--server")
    if not request.data.is_dir():
        raise UserError(f"--data {request.data}: no such folder; give the folder of the tasks")
    if (folder / "site.toml").exists():
        raise UserError(f"{folder}: holds a site already; choose another folder, or edit site.toml")
    if request.certificate is not None and not request.certificate.is_file():
        raise UserError(
            f"--certificate {request.certificate}: no such file; give the server's ca.crt"
        )
    try:
        (folder / "state").mkdir(parents=True, exist_ok=True)  # the unit lets nothing else change
        folder.chmod(0o700)
        pair = make_key_pair(request.name)
        shown = fingerprint_of_line(pair.public.decode())
        write_secret(folder / "site.key", pair.private)
        (folder / "site.pub").write_bytes(pair.public)
        if request.certificate is not None:
            shutil.copyfile(request.certificate, folder / "ca.crt")
        data = request.data.resolve()
        unit = site_unit(folder, data)
        (folder / "deal-site.service").write_text(unit, encoding="utf-8")
        (folder / "site.toml").write_text(_toml(request, data), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    return _next(request, shown)


def _toml(request: SiteRequest, data: Path) -> str:
    return filled(
        "site.toml",
        name=toml_value(request.name),
        address=toml_value(request.address),
        data=toml_value(str(data)),
        text=toml_value(request.text_column),
        label=toml_value(request.label_column),
        labels=LABELS.format(lines=label_lines(request.labels)) if request.labels else NO_LABELS,
        models=f'{toml_value(request.model)} = ""\n',
        policy=request.policy,
    )


def label_lines(labels: Mapping[str, Sequence[str]]) -> str:
    """Return lines of ``[data.labels]``."""
    return "".join(f"{toml_value(task)} = {toml_value(own)}\n" for task, own in labels.items())


def agreed_labels(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """Return task to labels, of every task that the experiment trains.

    Raises:
        UserError: it is no experiment for sites, or it names no labels.
    """
    if experiment.data.source != "sites":
        raise UserError(
            f"data.source is '{experiment.data.source}'; the experiment of a consortium has "
            'data.source = "sites" and [data.labels] with TASK = ["label", ...]'
        )
    labels = experiment.data.labels
    return {task: labels.get(task, ()) for task in SitesSource(experiment.data).task_names()}


def host_and_port(address: str, place: str) -> tuple[str, int]:
    """Return the host, an IPv6 address without its brackets, and the port.

    Args:
        address: ``HOST:PORT``.
        place: where it was written, for the message.

    Raises:
        UserError: a part is missing, or the port is none.
    """
    host, _, port = address.rpartition(":")
    bare = ":" in host and not (host.startswith("[") and host.endswith("]"))
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not host or bare or not 0 < number < 65536:
        raise UserError(
            f"{place} '{address}': write it as HOST:PORT, as the server's administrator gives it"
            f"{' (an IPv6 address in brackets)' if bare else ''}"
        )
    return host.strip("[]"), number


def _next(request: SiteRequest, shown: str) -> list[str]:
    folder = request.folder
    suffixes = ", ".join(READERS)
    labels = "" if request.labels else ", and [data.labels], without which no task is worked on"
    lines = [
        f"made {folder}: site.toml, site.key (private, stays here), site.pub, deal-site.service",
        f"fingerprint of this site's key: {shown}",
        "next:",
        f"  1. look through {folder / 'site.toml'} (columns, limits{labels}; data files are "
        f"{suffixes})",
        f"  2. send {folder / 'site.pub'} to the server's administrator, and compare the "
        "fingerprint by telephone",
    ]
    if request.certificate is None:
        lines.append(f"  3. put the server's ca.crt into {folder}, its address into site.toml")
    lines.append(
        "  for secure sums: read the fingerprint out to the other institutions by telephone, and "
        "write theirs into [peers]"
    )
    return [*lines, f"  then: deal site check {folder}, and deal site start {folder}"]


def site_unit(folder: Path, data: Path) -> str:
    """Return a systemd unit that keeps a site running. What it runs can read the data, and write
    the state folder; it can change neither ``site.toml`` with its limits, nor the
    keys, nor anything else of this machine's."""
    what, state = "Federated DEAL: site", folder / "state"
    return service_unit(what, "deal-site", "site start", folder, (data, folder), state)
