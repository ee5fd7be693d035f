"""What a site's state directory says of its private releases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from client.site_file import SiteFile, read_site
from deal_core.errors import UserError
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Entry, Ledger
from simulations.ledger_command import checked_entries, open_ledger, trusted

SITE_FILE = "site.toml"


@dataclass(frozen=True)
class Charge:
    """Releases of one kind, for one task of one run, together.

    Attributes:
        releases, steps: how many.
        first, last: when, UTC, ISO 8601.
        epsilon: of these alone, at ``delta``; None: no mechanism has protected them.
    """

    run: str
    task: str
    mechanism: str
    releases: int
    steps: int
    sample_rate: float
    noise_multiplier: float
    clipping_bound: float
    first: str
    last: str
    epsilon: float | None
    delta: float


@dataclass(frozen=True)
class LedgerRecord:
    """A site's ledger.

    Attributes:
        site: the site's own file; None: there is none beside the state directory, as in a
            simulation.
        disjoint_tasks: compose tasks in parallel, as the site's policy declares.
        limit: largest epsilon that the site allows for ever, by its policy, or else that its plans
            were made for; None: neither is known.
    """

    folder: Path
    entries: tuple[Entry, ...]
    site: SiteFile | None
    disjoint_tasks: bool
    limit: float | None

    @property
    def name(self) -> str:
        """Of the site, or of its folder."""
        return self.site.site.name if self.site else f"client {self.folder.name}"

    @property
    def protected(self) -> list[Entry]:
        """Entries of releases that a mechanism has protected."""
        return [entry for entry in self.entries if entry.event.protected]

    @property
    def unprotected(self) -> list[Entry]:
        """Entries of the others."""
        return [entry for entry in self.entries if not entry.event.protected]

    @property
    def delta(self) -> float | None:
        """The smallest of the protected releases: epsilon is told at it."""
        return min((entry.event.delta for entry in self.protected), default=None)

    @property
    def epsilon(self) -> float | None:
        """Of all protected releases together; None: there is none."""
        if self.delta is None:
            return None
        events = [entry.event for entry in self.protected]
        return composed(events, self.delta, self.disjoint_tasks)

    @property
    def charges(self) -> list[Charge]:
        """In the order of the ledger."""

        def key(entry: Entry) -> tuple[str, str, str]:
            event = entry.event
            return event.run, event.task, event.mechanism

        return [_charge(list(part)) for _, part in groupby(self.entries, key)]


def read_ledger(folder: str, disjoint_tasks: bool = False) -> LedgerRecord:
    """Return what a state directory says, after a check of the whole ledger.

    Args:
        folder: the state directory.
        disjoint_tasks: compose tasks in parallel; also where the site's policy declares it.

    Raises:
        UserError: no ledger in it, or one that cannot be trusted.
    """
    ledger = open_ledger(folder)
    entries = checked_entries(ledger)
    site = _site(ledger.folder)
    policy = site.policy if site else None
    disjoint = disjoint_tasks or bool(policy and policy.disjoint_tasks)
    limit = policy.max_epsilon if policy and policy.max_epsilon else _planned(ledger)
    return LedgerRecord(ledger.folder, tuple(entries), site, disjoint, limit)


def _site(state: Path) -> SiteFile | None:
    """Return the site's own file, if it lies beside its state directory and names it."""
    path = state.resolve().parent / SITE_FILE
    if not path.is_file():
        return None
    try:
        site = read_site(path)
    except UserError:
        return None
    return site if Path(site.site.state) == state.resolve() else None


def _planned(ledger: Ledger) -> float | None:
    """Return the largest budget that a plan of the ledger was made for."""
    budgets = []
    for body in trusted(ledger.plans).values():
        try:
            budgets.append(float(json.loads(body)["epsilon"]))
        except (ValueError, KeyError, TypeError):
            continue
    return max(budgets, default=None)


def _charge(entries: Sequence[Entry]) -> Charge:
    events = [entry.event for entry in entries]
    first, delta = events[0], min(event.delta for event in events)
    return Charge(
        run=first.run,
        task=first.task,
        mechanism=first.mechanism,
        releases=len(events),
        steps=sum(event.steps for event in events),
        sample_rate=first.sample_rate,
        noise_multiplier=first.noise_multiplier,
        clipping_bound=first.max_grad_norm,
        first=entries[0].time,
        last=entries[-1].time,
        epsilon=composed(events, delta) if first.protected else None,
        delta=delta,
    )
