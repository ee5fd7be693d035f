"""``deal site start``: keep Flower's SuperNode running, with the site's key."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from client.site_file import SiteFile, read_site, site_files
from deal_core.data.files import SiteSource
from deal_core.errors import UserError
from deal_core.installed import package_digest
from simulations.deployment.keys import check_secret
from simulations.deployment.programs import FlowerHome, supervise

IN_USE = "Failed to activate SuperNode"
UNKNOWN = "CERTIFICATE_VERIFY_FAILED"
HANDSHAKE = "SSL/TLS handshake error detected"
"""A connection that broke in the middle of a handshake, a proxy that was restarted: Flower's
SuperNode stops working after it, and does not end."""
CONNECTED = "SuperNode ID:"
AFTERLIFE_SECONDS = 90.0
"""How long after a crash the server may still believe that the site is connected: two missed
heartbeats, and something."""
RETRY_SECONDS = 5.0
REASONS = {
    UNKNOWN: "the server is not the one that ca.crt vouches for; compare it "
    "with the server's administrator",
    IN_USE: "the server does not know this key, or another process serves "
    "with it; let its administrator run deal server add-site",
    "terminated gracefully": "the server has refused a signature: the key is not registered any "
    "more, or the clocks differ; deal site check compares them",
}
"""What Flower writes when it gives up, and what that means."""


def start_site(folder: Path) -> int:
    """Run the SuperNode until it is stopped.

    Returns:
        The exit code, 0: it was asked to end.

    Raises:
        UserError: ``site.toml`` is wrong, a key is unsafe, tasks are not as disjoint as declared,
            the site runs already, or the server refuses it.
    """
    site = read_site(folder / "site.toml")
    check_secret(Path(site.server.key))
    if not Path(site.server.certificate).is_file():
        raise UserError(
            f"{site.server.certificate}: not there; it is the ca.crt of the server's administrator"
        )
    list(check_disjoint(site))  # read before anything is served
    state = Path(site.site.state)
    make_private(state)
    home = FlowerHome(state / "flower")
    command = supernode_command(folder)
    return _keep_going(site, command, home, state / "supernode.log", state / "site.pid")


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


def _keep_going(site: SiteFile, command: list[str], home: FlowerHome, log: Path, pid: Path) -> int:
    """Run the SuperNode, again where what has ended it will pass."""
    was_in = pid.exists()  # whoever ended in order has taken it away, or never was in
    give_up = time.monotonic() + (AFTERLIFE_SECONDS if was_in else 0.0)
    while True:
        start = log.stat().st_size if log.exists() else 0
        if supervise(command, home, log, pid, HANDSHAKE) == 0:
            return 0
        said = log.read_bytes()[start:].decode("utf-8", "replace")
        if CONNECTED in said:
            was_in, give_up = True, time.monotonic() + AFTERLIFE_SECONDS
        passes = HANDSHAKE in said and was_in and UNKNOWN not in said
        if not passes and (IN_USE not in said or time.monotonic() > give_up):
            if not was_in:  # it never was: the next start has nothing to wait for
                pid.unlink(missing_ok=True)
            raise UserError(f"{site.server.address}: {why(said)} (log: {log})")
        what = "no TLS with the server" if passes else "the server holds the connection from before"
        print(f"{what}; trying again", flush=True)
        time.sleep(RETRY_SECONDS)


def why(said: str) -> str:
    """Return the reason that Flower gave, in its own log."""
    for sign, reason in REASONS.items():
        if sign in said:
            return reason
    return "Flower's SuperNode has ended"


def starting_lines(folder: Path, site: SiteFile) -> list[str]:
    """Return what is about to run, and where to look."""
    return [
        f"site '{site.site.name}' serves {site.server.address}; Ctrl-C ends it",
        f"it runs what is installed here: federated-deal {package_digest()[:12]}",
        f"its log: {Path(site.site.state) / 'log.jsonl'}; Flower's: supernode.log beside it",
        f"next: nothing; to look at data and connection: deal site check {folder}",
    ]


def supernode_command(folder: Path) -> list[str]:
    """Return the command of this project's own start of Flower's SuperNode. ``-P``: nothing is
    imported from its working directory, which apps can write."""
    module = "simulations.deployment.site.supernode"
    return [sys.executable, "-P", "-m", module, str(folder / "site.toml")]
