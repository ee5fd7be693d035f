"""A site: its folder, ``deal site init``, which fills it with a key pair and a ``site.toml`` that
says what the site lends, its backup, and ``deal site start``, which keeps Flower's SuperNode
running."""

import shutil
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from client.site_file import NAME, SiteFile, read_site, site_files
from deal_core.config.experiment import Experiment, ModelConfig
from deal_core.data import SitesSource
from deal_core.data.files import SiteSource
from deal_core.data.tables import READERS
from deal_core.errors import UserError, at_home
from deal_core.installed import package_digest
from deal_core.privacy import ledger
from simulations.deployment import keys, service
from simulations.engines.flower import FlowerHome
from simulations.output import toml_value

MODULE = "simulations.deployment.site.programs"
IN_USE = "Failed to activate SuperNode"
UNKNOWN, EXPIRED = "CERTIFICATE_VERIFY_FAILED", "certificate has expired"
HANDSHAKE = "SSL/TLS handshake error detected"
"""A connection that broke in the middle of a handshake, a proxy that was restarted: Flower's
SuperNode stops working after it, and does not end."""
CONNECTED = "SuperNode ID:"
CONNECT_SECONDS = 10.0
AFTERLIFE_SECONDS = 90.0
"""How long after a crash the server may still believe that the site is connected: two missed
heartbeats, and something."""
RETRY_SECONDS = 5.0
REASONS = {
    EXPIRED: f"its {EXPIRED}; its administrator has to renew it",
    UNKNOWN: "the server is not the one that ca.crt vouches for; compare it "
    "with the server's administrator",
    IN_USE: "the server does not know this key, or another process serves "
    "with it; let its administrator run deal server add-site",
    "terminated gracefully": "the server has refused a signature: the key is not registered any "
    "more, or the clocks differ; deal site check compares them",
}
"""What Flower writes when it gives up, and what that means."""
LABELS = """\
[data.labels]            # every task that this site takes part in, and its labels, as agreed on
{lines}"""
NO_LABELS = """\
# Without [data.labels] the site takes part in no task. Add every task that it does take part in,
# with its labels, as the consortium has agreed on; deal site check --experiment prints the lines.
# [data.labels]
# TASK = ["label", "other label"]
"""


def init_site(
    folder: Path,
    data: Path,
    name: str,
    address: str = "SERVER:9443",
    certificate: Path | None = None,
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
    model: str = ModelConfig().name,
) -> list[str]:
    """Fill the folder of a site, whose data have one folder per task; the server's ``certificate``
    is copied, ``labels`` of each task and base ``model`` are those of the agreed experiment.

    Returns:
        The lines to print.

    Raises:
        UserError: a site is there already, a name or an address that is none, no such data, or
            the folder cannot be written.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name}: use letters, digits, '.', '_' and '-', up to 64")
    host_and_port(address, "--server")
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder; give the folder of the tasks")
    if (folder / "site.toml").exists():
        raise UserError(f"{folder}: holds a site already; choose another folder, or edit site.toml")
    if certificate is not None and not certificate.is_file():
        raise UserError(f"--certificate {certificate}: no such file; give the server's ca.crt")
    settings = service.filled(
        "site.toml",
        name=toml_value(name),
        address=toml_value(address),
        data=toml_value(str(data.resolve())),
        labels=LABELS.format(lines=label_lines(labels)) if labels else NO_LABELS,
        model=toml_value(model),
    )
    try:
        (folder / "state").mkdir(parents=True, exist_ok=True)  # the unit lets nothing else change
        folder.chmod(0o700)
        pair = keys.make_key_pair(name)
        keys.write_secret(folder / "site.key", pair.private)
        (folder / "site.pub").write_bytes(pair.public)
        if certificate is not None:
            shutil.copyfile(certificate, folder / "ca.crt")
        # What it runs can change neither site.toml with its limits, nor the keys.
        unit = service.unit("site", folder, (data.resolve(), folder), folder / "state")
        (folder / "deal-site.service").write_text(unit, encoding="utf-8")
        (folder / "site.toml").write_text(settings, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    without = "" if labels else ", and [data.labels], without which no task is worked on"
    third = f"  3. put the server's ca.crt into {folder}, its address into site.toml"
    return [
        f"made {folder}: site.toml, site.key (private, stays here), site.pub, deal-site.service",
        f"fingerprint of this site's key: {keys.fingerprint_of_line(pair.public.decode())}",
        "next:",
        f"  1. look through {folder / 'site.toml'} (columns, limits{without}; data files are "
        f"{', '.join(READERS)})",
        f"  2. send {folder / 'site.pub'} to the server's administrator, and compare the "
        "fingerprint by telephone",
        *([third] if certificate is None else []),
        "  for secure sums: read the fingerprint out to the other institutions by telephone, and "
        "write theirs into [peers]",
        f"  then: deal site check {folder}, and deal site start {folder}",
    ]


def label_lines(labels: Mapping[str, Sequence[str]]) -> str:
    """Return lines of ``[data.labels]``."""
    return "".join(f"{toml_value(task)} = {toml_value(own)}\n" for task, own in labels.items())


def agreed_labels(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """Return task to labels, of the experiment of a consortium. UserError: it is none."""
    if experiment.data.source != "sites":
        raise UserError(
            f"data.source is '{experiment.data.source}'; the experiment of a consortium has "
            'data.source = "sites" and [data.labels] with TASK = ["label", ...]'
        )
    labels = experiment.data.labels
    return {task: labels.get(task, ()) for task in SitesSource(experiment.data).task_names()}


def host_and_port(address: str, place: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``. UserError names ``place``: a part is missing."""
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(
            f"{place} '{address}': write it as HOST:PORT (an IPv6 address in brackets), as the "
            "server's administrator gives it"
        )
    return host, port


def reach(site: SiteFile) -> tuple[datetime, float | None]:
    """Ask the site's server for nothing in particular.

    Returns:
        Until when its certificate is valid, and by how many seconds its clock is ahead of the one
        here; None: it says nothing of the time.

    Raises:
        UserError: no connection, or a certificate that the authority does not vouch for.
    """
    address, certificate = site.server.address, site.server.certificate
    host, port = host_and_port(address, "server.address")
    try:
        context = ssl.create_default_context(cafile=certificate)
    except OSError:
        raise UserError(
            f"{certificate}: no certificate; get ca.crt from the server's administrator"
        ) from None
    proxy = "" if proxy_bypass(f"{host}:{port}") else getproxies().get("https", "")
    through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    first = (through.hostname, through.port or 8080) if through.hostname else (host, port)
    connection = HTTPSConnection(*first, timeout=CONNECT_SECONDS, context=context)
    if through.hostname:  # as Flower's SuperNode does
        connection.set_tunnel(host, port)
    try:
        before = time.time()
        connection.connect()
        told: Any = connection.sock.getpeercert()
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
        here = (before + time.time()) / 2
    except ssl.SSLCertVerificationError as error:
        cure = "compare ca.crt with the server's administrator"
        if "expired" in error.verify_message:
            cure = "its administrator has to renew it"
        raise UserError(
            f"{address}: not the server that {certificate} vouches for ({error.verify_message}); "
            f"{cure}"
        ) from None
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{address}: no connection ({error}); check address, firewall, and whether the server "
            "runs"
        ) from None
    finally:
        connection.close()
    end = datetime.fromtimestamp(ssl.cert_time_to_seconds(told["notAfter"]), UTC)
    # a date is in whole seconds
    return end, parsedate_to_datetime(date).timestamp() + 0.5 - here if date else None


def start_site(folder: Path) -> None:
    """Run Flower's SuperNode until it is asked to end. UserError: it cannot take part."""
    site = read_site(folder / "site.toml")
    state = Path(site.site.state)
    keys.check_secret(Path(site.server.key))
    if not Path(site.server.certificate).is_file():
        raise UserError(
            f"{site.server.certificate}: not there; it is the ca.crt of the server's administrator"
        )
    service.require_idle(state / "site.pid")
    list(check_disjoint(site))  # read before anything is served
    make_private(state)
    warnings = [*keys.expiring(Path(site.server.certificate))]
    try:
        if why := keys.expiry(reach(site)[0]):
            warnings.append(f"{site.server.address}: its certificate {why}")
    except UserError as error:
        warnings.append(str(error))  # the server may come later
    for line in warnings:
        print(f"warning: {line}")
    print(
        f"site '{site.site.name}' serves {site.server.address}; Ctrl-C ends it\n"
        f"it runs what is installed here: federated-deal {package_digest()[:12]}\n"
        f"its log: {state / 'log.jsonl'}; Flower's: supernode.log beside it\n"
        f"next: nothing; to look at data and connection: deal site check {folder}",
        flush=True,  # a service manager reads it from a pipe
    )
    # -P: nothing is imported from its working directory, which apps can write.
    command = [sys.executable, "-P", "-m", MODULE, "supernode", str(folder / "site.toml")]
    _keep_going(site, command)


def backup_site(folder: Path, to: str) -> list[str]:
    """Copy a site without its data; return the lines to print. UserError: it cannot be."""
    state = Path(read_site(folder / "site.toml").site.state)
    own = {path.name: path for path in folder.iterdir() if path.is_file()}
    target = at_home(to).absolute()
    done = service.backup({**own, "state": state}, target)
    entries = 0
    if (state / ledger.FILE).exists():
        try:
            entries = len(ledger.Ledger(target / "state").entries())
        except ledger.LedgerError as error:
            shutil.rmtree(target, ignore_errors=True)
            raise UserError(f"the ledger cannot be trusted: {error}") from None
    return [
        f"{done}; its ledger is whole, with {entries} entries",
        f"to restore: copy it to {folder} (state: {state}); never put back a ledger older than the "
        "last release: what it has spent since would be spent again",
    ]


def check_disjoint(site: SiteFile) -> Iterator[str]:
    """Yield that no two tasks have a record (or group) in common; nothing where the policy does not
    declare it. All training files are read.

    Raises:
        UserError: two have: the site would refuse the later of them for good, and the server would
            see that.
    """
    if site.policy is None or not site.policy.disjoint_tasks:
        return
    source = SiteSource(site_files(site.data), site.policy.unit_column)
    owner: dict[str, str] = {}
    for task in source.task_names():
        own = {example.whose for example in source.load(task).train}
        for other in dict.fromkeys(owner.values()):
            common = sum(1 for each in own if owner.get(each) == other)
            if common:
                raise UserError(
                    f"policy.disjoint_tasks: tasks '{other}' and '{task}' have {common} ids of "
                    "training records in common; separate them, or set disjoint_tasks to false"
                )
        owner.update(dict.fromkeys(own, task))
    yield f"policy.disjoint_tasks: no id is in two of {len(source.task_names())} tasks"


def make_private(state: Path) -> None:
    """Make the state folder, and let its owner alone into it: log and ledger are the site's."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if state.stat().st_mode & 0o077:
        state.chmod(0o700)


def _keep_going(site: SiteFile, command: list[str]) -> None:
    """Run the SuperNode until asked to end, again where what has ended it will pass."""
    state = Path(site.site.state)
    home, log, pid = FlowerHome(state / "flower"), state / "supernode.log", state / "site.pid"
    was_in = pid.exists()  # whoever ended in order has taken it away, or never was in
    give_up = time.monotonic() + (AFTERLIFE_SECONDS if was_in else 0.0)
    while True:
        start = log.stat().st_size if log.exists() else 0
        if service.supervise(command, home, log, pid, HANDSHAKE) == 0:
            return
        text = log.read_bytes()
        said = text[start if len(text) > start else 0 :].decode("utf-8", "replace")
        if CONNECTED in said:
            was_in, give_up = True, time.monotonic() + AFTERLIFE_SECONDS
        expired = EXPIRED in said
        passes = HANDSHAKE in said and was_in and (expired or UNKNOWN not in said)
        if not passes and (IN_USE not in said or time.monotonic() > give_up):
            if not was_in:  # it never was: the next start has nothing to wait for
                pid.unlink(missing_ok=True)
            known = (reason for sign, reason in REASONS.items() if sign in said)
            reason = next(known, "Flower's SuperNode has ended")
            raise UserError(f"{site.server.address}: {reason} (log: {log})")
        what = "no TLS with the server" if passes else "the server holds the connection from before"
        print(f"{REASONS[EXPIRED] if expired else what}; trying again", flush=True)
        time.sleep(RETRY_SECONDS)
