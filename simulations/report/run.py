"""The page of a run, from what its folder says: finished, at work, or stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np

from deal_core import metrics
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import WHERE, leaves
from deal_core.inference.folder import AdapterFolder
from server.folder import RunFolder
from server.results import extent
from simulations.output.files import DASH
from simulations.report.accuracy import accuracy_blocks, label_blocks
from simulations.report.blocks import (
    Block,
    Facts,
    Folded,
    Notice,
    Page,
    Section,
    Table,
    Text,
    Tiles,
    at_most,
    decimal,
    percent,
    points,
    size,
    time,
    whole,
)
from simulations.report.charts import Curve, Dot, dots, lines
from simulations.report.record import ClientLog, RoundLog, RunRecord, State
from simulations.run.progress import IDLE
from simulations.run.summary import large_delta, privacy_text, unheard_text

TONES: dict[State, Literal["good", "warn", "bad"]] = {
    "finished": "good",
    "running": "warn",
    "stopped": "bad",
}
COMMIT_LETTERS = 12
DRAWN = 40
"""Up to so many clients are drawn: those with the lowest accuracy."""
SHOWN = 200
"""Kinds of faults that are listed; the log has all."""
PHASES = {"learn": "training", "prototypes": "sums", "probe": "sums"}
FLOOR = 1e-6
"""Singular values below this part of the largest are rounding, and not drawn."""
HIDDEN = {*WHERE, "data.path", "data.files"}
"""Where files lie and how many threads there are: of the machine, and of no use elsewhere."""


def run_page(run: RunRecord) -> Page:
    """Return the page."""
    return Page(
        kind="Deployment" if run.experiment.run.engine == "deployment" else "Run",
        title=run.folder.name,
        subtitle=run.experiment.description,
        sections=tuple(
            Section(name, title, tuple(blocks(run))) for name, (title, blocks) in SECTIONS.items()
        ),
        state="stopped early" if run.state == "stopped" else run.state,
        tone=TONES[run.state],
        meta=tuple(_meta(run)),
        source="results.json" if run.results else "metrics.jsonl",
    )


def _meta(run: RunRecord) -> Iterator[str]:
    config = run.experiment
    yield f"method {config.method.name}"
    yield f"aggregation {config.aggregation.rule}"
    yield f"model {config.model.name}"
    yield f"{len(run.tasks)} tasks"
    yield f"{len(run.log.clients) or len(run.results.per_client if run.results else ())} clients"
    yield f"{run.log.planned} rounds"
    yield f"seed {config.run.seed}"
    yield f"engine {config.run.engine}"
    if run.results and run.results.commit:
        commit, _, dirty = run.results.commit.partition("-")
        yield f"commit {commit[:COMMIT_LETTERS]}{f' ({dirty})' if dirty else ''}"
    if run.log.ended:
        yield f"{datetime.fromtimestamp(run.log.ended, UTC):%Y-%m-%d %H:%M} UTC"


def _summary(run: RunRecord) -> Iterator[Block]:
    rounds = f"{run.log.passed} of {run.log.planned} rounds"
    if run.state == "running":
        yield Notice(f"The run is at work: {rounds} have ended. The page shows what is known.")
    if run.state == "stopped":
        why = f": {run.log.stopped}" if run.log.stopped else "; its process ended without a word"
        yield Notice(
            f"The run stopped early, after {rounds}{why}. The page shows what was known by then; "
            "there are no results. The same command with --resume continues it.",
            "bad",
        )
    yield Tiles(tuple(_tiles(run)))
    if run.results and not run.matrix:
        yield Notice(
            "Accuracy is not known: clients keep their counts of right answers, or a sum of them "
            "was lost."
        )
    if run.results and any(run.results.unheard):
        yield Notice(f"Counts of right answers: {unheard_text(run.results)}.")
    yield Text(
        "Accuracies are in %, over the test examples of all clients. Task-IL: the task is told, an "
        "answer is one of its own labels. Class-IL: an answer is one of the labels of all tasks "
        "seen so far. Transfer and forgetting are in points."
    )


def _tiles(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    start = [value for value in run.zero_shot if value is not None]
    found = run.results
    if found is None:
        if done := _so_far(run):
            note = f"{len(done)} of {len(run.tasks)} tasks learnt"
            yield "Task-IL accuracy so far", f"{percent(fmean(done))} %", note
    elif found.average_accuracy is not None:
        yield "Task-IL accuracy", f"{percent(found.average_accuracy)} %", "average at the end"
    if found and found.class_incremental:
        average = percent(found.class_incremental.average_accuracy)
        yield "Class-IL accuracy", f"{average} %", "average at the end"
    if start:
        yield "Zero-shot accuracy", f"{percent(fmean(start))} %", "before any training"
    if found is None:
        yield "Rounds", f"{run.log.passed} of {run.log.planned}", ""
        return
    if found.backward_transfer is not None:
        yield "Backward transfer", points(found.backward_transfer), "below 0: forgetting"
    if found.forward_transfer is not None:
        yield "Forward transfer", points(found.forward_transfer), "on tasks not yet learnt"
    if found.forgetting is not None:
        yield "Forgetting", percent(found.forgetting), "points from the best to the end"
    if worst := found.worst_client:
        yield "Worst client", f"{percent(worst[1])} %", f"client {run.log.name(worst[0])}"
    note = "by a client that is asked in every round"
    yield "Sent per client", size(sum(found.wire.bytes_up)), note
    yield "Received per client", size(found.wire.received), note
    yield "Time", time(found.seconds.get("total")), ""


def _so_far(run: RunRecord) -> list[float]:
    """Return the last accuracy on every task that is learnt by now."""
    _, learnt = metrics.spans(run.tasks, run.stages)
    last = zip(run.matrix[-1], learnt, strict=True) if run.matrix else ()
    return [value for value, i in last if value is not None and i < len(run.matrix)]


def _clients(run: RunRecord) -> Iterator[Block]:
    own = run.results.per_client if run.results else {}
    found = {run.log.name(number): client for number, client in own.items()}
    start = {name: _mean(client.zero_shot) for name, client in found.items()}
    at_end = {name: client.average_accuracy for name, client in found.items()}
    known = {name: value for name, value in at_end.items() if value is not None}
    left_out = {name: log.left_out for name, log in run.log.clients.items() if log.left_out}
    parts = (f"{name} ({count} ×)" for name, count in left_out.items())
    facts = [("left out of a round", ", ".join(parts) or "none")]
    if known:
        facts.append(("mean over clients", f"{percent(fmean(known.values()))} %"))
        spread = percent(pstdev(known.values()))
        facts.append(("standard deviation over clients", f"{spread} points"))
    yield Facts(tuple(facts))
    if len(known) > 1:
        lowest = sorted(known, key=lambda name: known[name])[:DRAWN]
        more = "" if len(lowest) == len(known) else f", the {DRAWN} lowest of {len(known)}"
        rows = [
            Dot(f"client {name}", 100 * known[name], before=_scaled(start[name])) for name in lowest
        ]
        yield dots(
            f"Average Task-IL accuracy of each client on its own test examples, at the end{more}. "
            "Hollow: zero-shot.",
            rows,
            "accuracy (%)",
            (100 * fmean(known.values()), "mean"),
        )
    elif not known:
        yield Text("Accuracy of each client is known when the run has finished.")
    table = []
    for name in dict.fromkeys([*run.log.clients, *found]):
        log, tests = run.log.clients.get(name, ClientLog()), found.get(name)
        cells = (_examples(log), whole(sum(tests.test_examples) if tests else None))
        accuracies = (percent(start.get(name)), percent(at_end.get(name)))
        table.append((name, *cells, *accuracies, *_replies(log)))
    columns = (
        *("client", "training examples", "test examples", "zero-shot", "accuracy"),
        *("replies used", "left out", "seconds a reply", "took no part"),
    )
    yield Table("Each client; accuracies in %", columns, tuple(table))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _examples(log: ClientLog) -> str:
    """Return the training examples of all tasks; a dash: the client does not say. Under privacy
    each client weighs 1, whatever it has."""
    told = log.examples.values()
    return whole(sum(told) if any(count != 1 for count in told) else None)


def _replies(log: ClientLog) -> tuple[str, ...]:
    count, seconds = len(log.replies), sum(log.replies.values())
    idle = ", ".join(f"{IDLE.get(code, code)} ({n} ×)" for code, n in log.idle.items())
    used, mean = whole(count - log.excluded), time(seconds / count if seconds else None)
    return used, whole(log.left_out), mean, idle or DASH


def _rounds(run: RunRecord) -> Iterator[Block]:
    done = run.log.done
    if not done:
        yield Text("No round has ended.")
        return
    facts = [("rounds played", f"{len(done)} of {run.log.planned}")]
    if run.log.skipped:
        facts.append(("rounds in which nothing was to be done", whole(run.log.skipped)))
    facts.append(("starts", whole(run.log.starts)))
    if run.results:
        phases = run.results.seconds.items()
        facts += [(f"time, {phase}", time(seconds)) for phase, seconds in phases]
        facts.append(("peak memory", size(run.results.peak_rss_bytes)))
    yield Facts(tuple(facts))
    if any(each.loss for each in done) and len(done) > 1:
        numbers = tuple(float(each.number) for each in done)
        yield lines(
            "Mean training loss of each round.",
            [Curve("", numbers, tuple(each.loss for each in done))],
            ("round", "mean training loss"),
            from_zero=True,
        )
    columns = (
        *("round", "stage", "phase", "tasks", "clients", "mean loss", "aggregation error"),
        *("time", "sent per client", "received per client"),
    )
    yield Table("Every round that has ended", columns, tuple(map(_round, done)))
    yield Text(
        "Aggregation error: relative difference of what the rule gives from the exact mean of the "
        "updates; 0 where nothing is aggregated."
    )


def _round(one: RoundLog) -> tuple[str, ...]:
    return (
        str(one.number),
        str(one.stage + 1),
        PHASES.get(one.phase, one.phase),
        ", ".join(one.tasks),
        f"{one.answered - one.excluded} of {one.asked}",
        decimal(one.loss, 4),
        decimal(one.error),
        time(one.seconds),
        size(one.bytes_up),
        size(one.bytes_down),
    )


def _privacy(run: RunRecord) -> Iterator[Block]:
    config, told = run.experiment.privacy, run.privacy
    if config.mechanism == "none":
        yield Notice(
            "No mechanism protects the updates. No text leaves its client, but an adapter may tell "
            "of the records that it was trained on: no epsilon holds. The experiment private shows "
            "how to change that."
        )
        return
    if told.simulation_only:
        yield Notice(
            "Simulation only: noise came from a seed, so that the run can be repeated. Whoever "
            "knows the seed can take the noise off: nothing is guaranteed."
        )
    if warning := large_delta(told):
        yield Notice(f"{warning[0].upper()}{warning[1:]}.")
    yield Text(f"Mechanism {privacy_text(told)}.")
    limit = decimal(config.target_epsilon, 4)
    rest = (limit, at_most(told.delta), told.unit_text, extent(told.disjoint_tasks))
    if told.epsilon:
        yield Table(
            "Spending of each client",
            ("client", "epsilon spent", "limit", "delta", "unit", "composed over"),
            tuple((run.log.name(n), at_most(spent, 4), *rest) for n, spent in told.epsilon.items()),
        )
    delta = f"delta = {config.target_delta:g}" if config.target_delta else "the client's own delta"
    yield Facts(
        (
            ("unit of privacy", told.unit_text),
            (
                "limit of the experiment",
                f"epsilon = {limit} for all that a client's ledger holds, at {delta}, per "
                f"{told.unit_text}; at a site, its own policy may set a lower one",
            ),
            ("assumed honest", told.trust),
            ("clipping bound of a gradient", decimal(config.max_grad_norm)),
            ("counts of right answers leave", config.metrics),
        )
    )


def _adapter(run: RunRecord) -> Iterator[Block]:
    spectra = read_spectra(RunFolder(run.folder))
    if not spectra:
        yield Text("There is no adapter file; it is written when a run has finished.")
        return
    rank = ("rank in the file, retained and current", whole(max(map(len, spectra))))
    yield Facts((("adapted layers", whole(len(spectra))), rank))
    rows = np.full((len(spectra), max(map(len, spectra))), np.nan)
    for row, values in zip(rows, spectra, strict=True):
        if values.any():
            row[: len(values)] = values / values[0]
    rows[rows < FLOOR] = np.nan
    kept = [column for column in rows.T if not np.isnan(column).all()]
    if not kept:
        yield Text("The adapter is zero: the base model answers as it was.")
        return
    middle, low, high = (
        tuple(float(each(column)) for column in kept)
        for each in (np.nanmedian, np.nanmin, np.nanmax)
    )
    places = tuple(float(i) for i in range(1, len(kept) + 1))
    table = tuple(
        (whole(place), *map(decimal, values))
        for place, *values in zip(places, middle, low, high, strict=True)
    )
    yield lines(
        "Singular values of what was learnt and retained, in each layer divided by the largest. "
        "Band: from the smallest to the largest over layers. A steep fall says that a smaller rank "
        "would do.",
        [Curve("median over layers", places, middle, low, high)],
        ("direction", "singular value / largest"),
        Table("Singular values", ("direction", "median", "smallest", "largest"), table),
        from_zero=True,
    )


def read_spectra(run: RunFolder) -> list[np.ndarray]:
    """Return the singular values of each layer's update in the adapter of a run, the largest first;
    none: there is no adapter, or it cannot be read, which must not cost the page."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(AdapterFolder(run.adapter).weights)
    except (OSError, SafetensorError):
        return []
    ups = {name: name.replace(".lora_A.", ".lora_B.") for name in sorted(arrays)}
    return [
        singular_values(arrays[name], arrays[up])
        for name, up in ups.items()
        if up != name and up in arrays
    ]


def singular_values(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Return those of ``up @ down`` without making that matrix.

    Args:
        down: ``lora_A``, rank by inputs.
        up: ``lora_B``, outputs by rank.
    """
    of_inputs = np.asarray(np.linalg.qr(down.astype(np.float64).T, mode="r"))
    of_outputs = np.asarray(np.linalg.qr(up.astype(np.float64), mode="r"))
    return np.asarray(np.linalg.svd(of_outputs @ of_inputs.T, compute_uv=False))


def _faults(run: RunRecord) -> Iterator[Block]:
    """Yield faults, those alike together."""
    found = run.log.faults
    if not found:
        yield Text("None: every reply that was asked for came and was used.")
        return
    alike = Counter((fault.what, fault.client, fault.why) for fault in found)
    rows = []
    for (what, client, why), times in list(alike.items())[:SHOWN]:
        own = [f for f in found if (f.what, f.client, f.why) == (what, client, why)]
        first = f"{datetime.fromtimestamp(own[0].time, UTC):%Y-%m-%d %H:%M:%S}"
        rounds = ", ".join(dict.fromkeys(str(f.round) for f in own if f.round))
        rows.append((what, client or DASH, whole(times), rounds or DASH, first, why))
    columns = ("what", "client", "times", "rounds", "first (UTC)", "why")
    if len(alike) > SHOWN:
        yield Notice(f"{len(alike)} kinds in all; metrics.jsonl has the others.")
    yield Table("What went wrong, in order", columns, tuple(rows))


def _settings(run: RunRecord) -> Iterator[Block]:
    results = run.results
    if results:
        known = (("commit", results.commit or "not known"), ("finished (UTC)", results.finished))
        yield Facts((*known, *results.versions.items()))
    usual = leaves(Experiment())
    own = {key: value for key, value in leaves(run.experiment).items() if key not in HIDDEN}
    rows = {key: (key, shown(value), shown(usual[key])) for key, value in own.items()}
    changed = tuple(rows[key] for key, value in own.items() if value != usual[key])
    columns = ("key", "value", "default")
    yield Table("Settings other than the defaults", columns, changed)
    if results and results.labels:
        names = tuple(
            (f"{j} {task}", whole(len(own)), ", ".join(own) or "texts")
            for j, task in enumerate(run.tasks, start=1)
            for own in [results.labels.get(task, [])]
        )
        table = Table("Labels of each task", ("task", "labels", "names"), names)
        yield Folded("Labels of each task", (table,))
    yield Folded("All settings", (Table("All settings", columns, tuple(rows.values())),))


def shown(value: Any) -> str:
    """Return a setting's value as it stands in a file."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


SECTIONS: Mapping[str, tuple[str, Callable[[RunRecord], Iterator[Block]]]] = {
    "summary": ("Summary", _summary),
    "accuracy": ("Accuracy on every task", accuracy_blocks),
    "labels": ("Labels", label_blocks),
    "clients": ("Clients", _clients),
    "rounds": ("Rounds", _rounds),
    "privacy": ("Privacy", _privacy),
    "adapter": ("Learnt adapter", _adapter),
    "faults": ("Faults", _faults),
    "settings": ("Settings and versions", _settings),
}
