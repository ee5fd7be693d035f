"""The page of a run."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from simulations.report.page.blocks import Page, Section
from simulations.report.run.accuracy import accuracy
from simulations.report.run.adapter import adapter
from simulations.report.run.clients import clients
from simulations.report.run.confusion import labels_section
from simulations.report.run.faults import faults
from simulations.report.run.privacy import privacy
from simulations.report.run.record import RunRecord
from simulations.report.run.rounds import rounds
from simulations.report.run.settings import settings
from simulations.report.run.summary import summary

SECTIONS = (summary, accuracy, labels_section, clients, rounds, privacy, adapter, faults, settings)
"""In the order of the page."""
TONES = {"finished": "good", "running": "warn", "stopped": "bad"}
COMMIT_LETTERS = 12


def run_page(run: RunRecord) -> Page:
    """Return the page."""
    kind = "Deployment" if run.experiment.run.engine == "deployment" else "Run"
    return Page(
        kind=kind,
        title=run.folder.name,
        subtitle=run.experiment.description,
        sections=tuple(_sections(run)),
        state="stopped early" if run.state == "stopped" else run.state,
        tone=TONES[run.state],  # type: ignore[arg-type]
        meta=tuple(_meta(run)),
        source="results.json" if run.results is not None else "metrics.jsonl",
    )


def _sections(run: RunRecord) -> Iterator[Section]:
    for make in SECTIONS:
        yield make(run)


def _meta(run: RunRecord) -> Iterator[str]:
    config = run.experiment
    yield f"method {config.method.name}"
    yield f"aggregation {config.aggregation.rule}"
    yield f"model {config.model.name}"
    yield f"{len(run.tasks)} tasks"
    yield f"{len(run.log.clients) or len(run.averages)} clients"
    yield f"{sum(rounds for _, rounds in run.log.stages) or len(run.log.done)} rounds"
    yield f"seed {config.run.seed}"
    yield f"engine {config.run.engine}"
    if run.results is not None and run.results.commit:
        commit, _, dirty = run.results.commit.partition("-")
        yield f"commit {commit[:COMMIT_LETTERS]}{f' ({dirty})' if dirty else ''}"
    ended = run.results.finished if run.results else ""
    moment = datetime.fromisoformat(ended) if ended else None
    if moment is None and run.log.ended:
        moment = datetime.fromtimestamp(run.log.ended, UTC)
    if moment is not None:
        yield f"{moment:%Y-%m-%d %H:%M} UTC"
