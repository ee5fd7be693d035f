"""The sites of a run as a table, and below it what its epsilons mean."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deal_core.privacy.accounting.unit import unit_text
from server.spending import MORE_TRUST, VOID, Spending, rounded_up, whole_extent
from simulations.deployment.server.round_state import span
from simulations.deployment.server.run_state import RunState, SiteState
from simulations.output.console import print_line

COLUMNS = ("site", "connection", "last reply", "task", "rounds", "faults", "last fault")


def print_sites(
    console: Console, connections: Mapping[str, str], state: RunState, fault: str
) -> None:
    """Print a line for each site of a run, and for each that is registered.

    Args:
        console: to print on.
        connections: registered site to what the server knows of its connection.
        state: of the run; a new one where there is none yet.
        fault: why connections are not known; empty: they are.
    """
    spent = {name: site.spent for name, site in state.sites.items() if site.spent is not None}
    table = Table()
    for column in COLUMNS:
        table.add_column(column)
    if spent:
        table.add_column(f"ε per {unit_text(state.unit, state.unit_column)} so far")
    for name in [*state.sites, *(name for name in connections if name not in state.sites)]:
        site = state.sites.get(name, SiteState())
        row = _row(name, connections.get(name, "not registered"), site)
        row += [_cost(site.spent)] if spent else []
        table.add_row(*map(Text, row))  # a site's own words are no markup
    console.print(table)
    for line in epsilon_lines(spent, state.assumes):
        print_line(console, line)
    if fault:
        print_line(console, f"connections unknown: {fault}")


def _row(name: str, connection: str, site: SiteState) -> list[Any]:
    last = f"{span(time.time() - site.last_seen)} ago" if site.last_seen else "never"
    counts = [str(site.rounds), str(site.faults)]
    return [name, connection, last, site.task, *counts, site.last_fault]


def _cost(spent: Spending | None) -> str:
    """An epsilon with its delta; the lines of :func:`epsilon_lines` say the rest."""
    if spent is None:
        return ""
    void = ", void for some" if spent.void else ""
    seeded = ", simulation only" if spent.simulation_only else ""
    return f"{rounded_up(spent.epsilon, 3)} at δ {rounded_up(spent.delta, 2)}{void}{seeded}"


def epsilon_lines(spent: Mapping[str, Spending], assumes: str) -> list[str]:
    """Return what the epsilons of a run compose over, and whom they take to be honest: nobody can
    read one without.

    Args:
        spent: site to what it has spent; empty: no line.
        assumes: whom the run's settings take to be honest.
    """
    if not spent:
        return []
    extents: dict[str, list[str]] = {}
    for name, each in spent.items():
        extents.setdefault(whole_extent(each.disjoint_tasks), []).append(name)
    lines = [f"{_whose(names, spent)} composes over {extent}" for extent, names in extents.items()]
    lines.append(f"whom ε counts on: {assumes or 'not known'}")
    more = [name for name, each in spent.items() if each.assumes_more]
    lines += [f"{_whose(more, spent)} counts on these {MORE_TRUST}"] if more else []
    void = [name for name, each in spent.items() if each.void]
    return [*lines, *([f"{_whose(void, spent)} is {VOID}"] if void else [])]


def _whose(names: Iterable[str], spent: Mapping[str, Spending]) -> str:
    """Say of which sites an epsilon is; of all: without their names."""
    return "ε" if set(names) == spent.keys() else f"ε of {', '.join(names)}"
