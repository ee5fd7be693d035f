"""Figures for Prometheus, read from the run folders when asked; on this machine only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deal_core.privacy.accounting.unit import unit_text
from server.spending import rounded_up, whole_extent, whole_trust
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.server.run_state import RunState, SiteState, state_of

LATEST = 20
"""Runs that are shown: the newest."""
PHASES = ("starting", "running", "stopped", "finished")


class RunFigures(Collector):
    """Reads the newest runs below ``runs``."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield one family per figure."""
        folders = sorted(self._runs.glob("*"), key=lambda p: p.stat().st_mtime)[-LATEST:]
        states = {folder.name: state_of(folder) for folder in folders if folder.is_dir()}
        yield from _of_runs(states)
        yield from _of_sites(states)


def _of_runs(states: dict[str, RunState]) -> Iterator[GaugeMetricFamily]:
    figures: dict[str, tuple[str, Callable[[RunState], float]]] = {
        "rounds_finished": ("rounds that have finished", lambda s: s.rounds),
        "rounds_planned": ("rounds of the whole run", lambda s: s.planned),
        "stage": ("stage, from 0", lambda s: s.stage),
        "bytes_up": ("payload sent, mean per site", lambda s: s.bytes_up),
        "bytes_down": ("payload received, mean per site", lambda s: s.bytes_down),
        "quarantined": ("sites left out of the last round", lambda s: len(s.quarantined)),
        "last_event_seconds": ("time of the last event", lambda s: s.last_event),
    }
    for name, (text, value) in figures.items():
        family = GaugeMetricFamily(f"deal_run_{name}", text, labels=["run"])
        for run, state in states.items():
            family.add_metric([run], float(value(state)))
        yield family
    phases = GaugeMetricFamily(
        "deal_run_phase", "1 for the phase it is in", labels=["run", "phase"]
    )
    accuracy = GaugeMetricFamily("deal_run_accuracy", "0 to 1", labels=["run", "task"])
    among_all = GaugeMetricFamily(
        "deal_run_accuracy_among_all",
        "0 to 1, among all labels seen so far",
        labels=["run", "task"],
    )
    for run, state in states.items():
        for phase in PHASES:
            phases.add_metric([run, phase], float(state.phase == phase))
        for task, share in state.accuracy.items():
            accuracy.add_metric([run, task], share)
        for task, share in state.among_all.items():
            among_all.add_metric([run, task], share)
    yield phases
    yield accuracy
    yield among_all


def _of_sites(states: dict[str, RunState]) -> Iterator[GaugeMetricFamily]:
    figures: dict[str, tuple[str, Callable[[SiteState], float | None]]] = {
        "last_reply_seconds": ("time of the last valid reply", lambda s: s.last_seen),
        "rounds": ("valid updates", lambda s: s.rounds),
        "faults": ("rounds without a valid reply, and dropped replies", lambda s: s.faults),
    }
    for name, (text, value) in figures.items():
        family = GaugeMetricFamily(f"deal_site_{name}", text, labels=["run", "site"])
        for run, state in states.items():
            for site_name, site in state.sites.items():
                figure = value(site)
                if figure is not None:
                    family.add_metric([run, site_name], float(figure))
        yield family
    yield _spending(states)


def _spending(states: dict[str, RunState]) -> GaugeMetricFamily:
    """An epsilon says nothing without its labels."""
    text = "privacy spent so far, where a site tells it"
    labels = ["run", "site", "delta", "unit", "over", "assumes", "void", "simulation_only"]
    family = GaugeMetricFamily("deal_site_epsilon", text, labels=labels)
    for run, state in states.items():
        for name, site in state.sites.items():
            if site.spent is not None:
                spent, seeded = site.spent, str(site.spent.simulation_only).lower()
                over = whole_extent(spent.disjoint_tasks)
                trust = whole_trust(state.assumes, spent.assumes_more)
                unit = unit_text(state.unit, state.unit_column)
                delta, void = rounded_up(spent.delta, 2), str(spent.void).lower()
                own = [run, name, delta, unit, over, trust, void, seeded]
                family.add_metric(own, spent.epsilon)
    return family


def serve(folder: ServerFolder, port: int) -> None:
    """Answer on ``http://127.0.0.1:PORT/metrics`` from a thread of this process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunFigures(folder.runs))
    start_http_server(port, addr="127.0.0.1", registry=registry)
