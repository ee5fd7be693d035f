"""Progress for people: a live view on a terminal, one line a round elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deal_core.privacy.events import unit_text
from server.results import EARLIER, VOID, extent, rounded_up, whole_trust
from simulations.output.console import print_line
from simulations.run.progress import PHASES, Progress, RunEvent

IDLE = {
    "no-data": "no example of the task",
    "budget-spent": "its privacy budget is spent",
    "policy": "its policy does not allow what the experiment asks",
    "withheld": "its counts stay where they are",
    "masked": "its update of this round is in another sum",
}
"""Codes of clients that take no part, in words."""


SHOWN = (
    "checkpoint_damaged",
    "client_failed",
    "evaluation_lost",
    "round_lost",
    "step_lost",
    "weight_cut",
    "counts_cut",
)
"""Events that stay on a terminal above the live view."""


@contextmanager
def progress_view(console: Console, name: str) -> Iterator[Callable[[RunEvent], None]]:
    """Show the run while the block lasts; yields what takes the events."""
    state = Progress()

    def plain(event: RunEvent) -> None:
        nonlocal state
        state = state.update(event)
        for line in plain_lines(event, state):
            print_line(console, line)

    if not console.is_terminal:
        yield plain
        return

    def render() -> RenderableType:
        return live_view(name, state, time.time())

    def listen(event: RunEvent) -> None:
        nonlocal state
        state = state.update(event)
        if event["event"] in SHOWN:
            live.console.print(plain_lines(event, state)[0], markup=False, highlight=False)

    with Live(get_renderable=render, console=console, refresh_per_second=4, transient=True) as live:
        yield listen


def plain_lines(event: RunEvent, state: Progress) -> list[str]:
    """Return what to print for an event, ``state`` being the state after it."""
    kind = event["event"]
    if kind == "run_started":
        start = f"resumed after {state.done} of {state.total} rounds" if state.done else "started"
        return [f"{start}: {len(state.tasks)} tasks, {event['clients']} clients"]
    if kind == "checkpoint_damaged":
        reason = event["reason"].partition(";")[0]  # without the cure of who has no other
        return [f"resumed from the checkpoint before the last one: {reason}"]
    if kind == "client_failed":
        return [f"client {event['client']} left out: {event['reason']}"]
    if kind in ("evaluation_lost", "round_lost", "step_lost"):
        return [f"lost, the model stays as it was: {event['reason']}"]
    if kind == "leg_failed":
        return [f"client {event['client']} missed the leg {event['leg']}: {event['reason']}"]
    if kind == "client_blamed":
        return [f"client {event['by']} refuses what client {event['client']} sent it"]
    if kind == "weight_cut":
        return [f"client {event['client']} weighs {event['weight']:g}, not what it claimed"]
    if kind == "counts_cut":
        return [f"client {event['client']} claims more test rows than count: they are cut"]
    if kind == "client_idle":
        return [f"client {event['client']} takes no part: {IDLE.get(event['code'], event['code'])}"]
    if kind == "round_finished":
        return [_where(state) + ", " + ", ".join(_figures(state, event["time"]))]
    if kind == "evaluated" and event["stage"] < 0:
        return [f"zero-shot accuracy {percent(state.zero_shot)}"]
    if kind == "evaluated":
        known = f"{len(state.learnt)} of {len(state.tasks)} tasks"
        return [f"{known} learnt, accuracy so far {_so_far(state)}"]
    return []


def _where(state: Progress) -> str:
    return f"{state.place}, round {state.server_round}/{state.rounds}"


def _figures(state: Progress, now: float) -> list[str]:
    figures = [f"{state.answered}/{state.asked} clients", f"{state.round_seconds:.1f} s"]
    if state.loss is not None:
        figures.append(f"loss {state.loss:.3f}")
    if state.aggregation_error is not None:
        figures.append(f"aggregation error {state.aggregation_error:.3g}")
    figures += spent(state)
    left = state.seconds_left(now)
    if left:
        figures.append(f"about {duration(left)} left")
    return figures


def live_view(name: str, state: Progress, now: float) -> RenderableType:
    """Return the live view: where the run is, how far, and how good so far."""
    where = Text.assemble((name, "bold"), " · ", state.phase)
    if state.place:
        where.append(f" · {_where(state)}")
    if state.phase in PHASES.values():
        where.append(f" · {state.answered}/{state.asked} clients")
        if state.client and state.loss is not None:
            where.append(f" (last: client {state.client}, mean loss {state.loss:.3f})")
    bar = Table.grid(padding=(0, 1))
    left = state.seconds_left(now)
    bar.add_row(
        ProgressBar(total=max(1, state.total), completed=state.done, width=40),
        f"{state.done}/{state.total} rounds",
        f"about {duration(left)} left" if left else "",
    )
    return Group(where, bar, Text(_quality(state)))


def _quality(state: Progress) -> str:
    parts = []
    if state.accuracy_so_far is not None:
        known = f"{len(state.learnt)} of {len(state.tasks)} tasks learnt"
        parts.append(f"accuracy so far {_so_far(state)} ({known})")
    if state.zero_shot is not None:
        parts.append(f"zero-shot {percent(state.zero_shot)}")
    if state.aggregation_error is not None:
        parts.append(f"aggregation error {state.aggregation_error:.3g}")
    if state.failures:
        parts.append(f"{len(state.failures)} clients left out")
    parts += spent(state)
    return " · ".join(parts)


def _so_far(state: Progress) -> str:
    """In both protocols, where both are known."""
    among_all = state.among_all_so_far
    more = "" if among_all is None else f", {percent(among_all)} among all labels"
    return percent(state.accuracy_so_far) + more


def spent(state: Progress) -> list[str]:
    """Return what privacy has cost: an epsilon is never without its delta, unit and extent."""
    if state.epsilon is None or not state.unit:
        return []
    seeded = ", simulation only" if state.simulation_only else ""
    unit = unit_text(state.unit, state.unit_column)
    trust = whole_trust(state.assumes, state.assumes_more)
    void = f", {VOID}" if state.void else ""
    whose = f"{EARLIER}, largest over the clients that have answered"
    return [
        f"epsilon {rounded_up(state.epsilon, 3)} at delta {rounded_up(state.delta, 2)} per {unit}, "
        f"{extent(state.disjoint_tasks)} so far{whose}; {trust}{void}{seeded}"
    ]


def percent(share: float | None) -> str:
    """Return ``51.3 %``, or a dash where there is no number."""
    return "–" if share is None else f"{100 * share:.1f} %"


def signed(difference: float) -> str:
    """Return points with their sign: ``+1.5``."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # + 0.0: no minus before a zero


def duration(seconds: float) -> str:
    """Return a rounded time: ``40 s``, ``2 min 10 s``, ``3 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
