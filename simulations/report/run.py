"""The page of a run, from what its folder says: finished, at work, or stopped."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, pstdev

from deal_core import metrics
from deal_core.config.experiment import Experiment
from server.folder import RunEvent
from server.results import extent
from simulations.output import DASH, Table, percent, signed, size, stage_title
from simulations.report import blocks as html
from simulations.report.labels import label_blocks
from simulations.report.record import Rows, RunRecord, State, read_run, settings_text
from simulations.run import summary
from simulations.run.data_checks import membership_text
from simulations.run.run_log import IDLE, PHASES, Round, reason_in

TONES: dict[State, html.Tone] = {"finished": "good", "running": "warn", "stopped": "bad"}
FAULTS = {
    "client_failed": "reply not used",
    "reply_dropped": "reply dropped",
    "reply_late": "reply came late",
    "reply_slow": "reply came shortly before the deadline",
    "ledger_older": "ledger older than before",
    "client_blamed": "blamed by another client",
    "weight_cut": "weight cut",
    "counts_cut": "test rows cut",
    "client_idle": "took no part",
    "evaluation_lost": "evaluation lost",
    "round_lost": "round lost",
    "step_lost": "step lost",
    "checkpoint_damaged": "checkpoint damaged",
    "adapter_missing": "adapter not handed over",
    "sums_left_out": "class sums of fewer than three clients left out",
    "class_means_doubted": "new class means doubted",
    "class_means_rejected": "new class means left out",
    "run_stopped": "run stopped",
}
"""Events that a reader asks after, in words."""
ROUNDING = 1e-6
"""Relative differences below are of floating-point numbers, and shown as 0."""
NAMED_COLUMNS = 8
"""Up to so many tasks a matrix names them in its columns; beyond, it has their numbers."""


def run_page(folder: Path) -> html.Page:
    """Return the page of the run in a folder. UserError: it is none, or cannot be read."""
    run = read_run(folder)
    return html.Page(
        kind="Deployment" if run.experiment.run.engine == "deployment" else "Run",
        title=run.folder.name,
        subtitle=run.experiment.description,
        sections=tuple(
            html.Section(name, title, tuple(blocks(run)))
            for name, (title, blocks) in SECTIONS.items()
        ),
        state="stopped early" if run.state == "stopped" else run.state,
        tone=TONES[run.state],
        meta=tuple(_meta(run)),
        source="results.json" if run.results else "metrics.jsonl",
    )


def _meta(run: RunRecord) -> Iterator[str]:
    config = run.experiment
    yield from (f"method {config.method.name}", f"aggregation {config.aggregation.rule}")
    yield from (f"model {config.model.name}", f"{len(run.tasks)} tasks")
    yield from (f"{len(run.log.clients)} clients", f"{run.log.planned} rounds")
    yield from (f"seed {config.run.seed}", f"engine {config.run.engine}")
    yield f"{datetime.fromtimestamp(run.log.events[-1]['time'], UTC):%Y-%m-%d %H:%M} UTC"


def _summary(run: RunRecord) -> Iterator[html.Block]:
    rounds = f"{run.log.passed} of {run.log.planned} rounds"
    if run.state == "running":
        yield html.Text(
            f"The run is at work: {rounds} have ended. The page shows what is known.", "warn"
        )
    if run.state == "stopped":
        why = f": {run.log.stopped}" if run.log.stopped else "; its process ended without a word"
        yield html.Text(
            f"The run stopped early, after {rounds}{why}. The page shows what was known by then; "
            "there are no results. The same command with --resume continues it.",
            "bad",
        )
    yield html.Tiles(tuple(_tiles(run)))
    if run.results and not run.matrix:
        yield html.Text(
            "Accuracy is not known: clients keep their counts of right answers, or a sum of them "
            "was lost.",
            "warn",
        )
    if run.results and any(run.results.unheard):
        yield html.Text(f"Counts of right answers: {summary.unheard_text(run.results)}.", "warn")
    yield html.Text(
        "Accuracies are in %, over the test examples of all clients. Task-IL: the task is told, an "
        "answer is one of its own labels. Class-IL: an answer is one of the labels of all tasks "
        "seen so far. Transfer and forgetting are in points."
    )


def _tiles(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    start, found = [value for value in run.zero_shot if value is not None], run.results
    zero_shot = percent(fmean(start) if start else None)
    name = summary.one_name(run.measured)
    if found is None:
        done = _so_far(run)
        note = f"{len(done)} of {len(run.tasks)} tasks learnt"
        tiles = [
            (f"Task-IL {name} so far", f"{percent(fmean(done) if done else None)} %", note),
            (f"Zero-shot {name}", f"{zero_shot} %", "before any training"),
            ("Rounds", f"{run.log.passed} of {run.log.planned}", ""),
        ]
    else:
        among_all, worst = found.class_incremental, found.worst_client or ("", None)
        average = percent(among_all.average_accuracy if among_all else None)
        note = "by a client that is asked in every round"
        tiles = [
            (f"Task-IL {name}", f"{percent(found.average_accuracy)} %", "average at the end"),
            (f"Class-IL {name}", f"{average} %", "average at the end"),
            (f"Zero-shot {name}", f"{zero_shot} %", "before any training"),
            ("Backward transfer", signed(found.backward_transfer), "below 0: forgetting"),
            ("Forward transfer", signed(found.forward_transfer), "on tasks not yet learnt"),
            ("Forgetting", percent(found.forgetting), "points from the best to the end"),
            ("Worst client", f"{percent(worst[1])} %", f"client {run.log.name(worst[0])}"),
            ("Sent per client", size(sum(found.wire.bytes_up)), note),
            ("Received per client", size(found.wire.received), note),
            ("Time", html.time(found.seconds.get("total")), ""),
        ]
    if run.privacy.epsilon:
        limit = html.decimal(run.experiment.privacy.target_epsilon, 4)
        delta = (
            f"of {limit} at delta = {html.at_most(run.privacy.delta)}, per {run.privacy.unit_text}"
        )
        tiles.insert(1, ("Epsilon spent", html.at_most(max(run.privacy.epsilon.values())), delta))
    yield from (tile for tile in tiles if not tile[1].startswith(DASH))


def _so_far(run: RunRecord) -> list[float]:
    _, learnt = metrics.spans(run.tasks, run.stages)
    ended = [j for j, i in enumerate(learnt) if i < len(run.matrix)]
    latest = (
        next((row[j] for row in reversed(run.matrix) if row[j] is not None), None) for j in ended
    )
    return [value for value in latest if value is not None]


def _accuracy(run: RunRecord) -> Iterator[html.Block]:
    if not run.matrix and not any(value is not None for value in run.zero_shot):
        yield html.Text("Nothing has been evaluated.", "warn")
        return
    name = summary.one_name(run.measured)
    for measure in dict.fromkeys(run.measured):
        own = [task for task, each in zip(run.tasks, run.measured, strict=True) if each == measure]
        if measure != summary.ACCURACY:
            yield html.Text(f"Answers are texts, measured by {measure}, in: {', '.join(own)}.")
    yield _matrix(run, run.matrix, f"Task-IL {name} in %")
    if run.class_il:
        yield _matrix(run, run.class_il, f"Class-IL {name} in %")
    if run.results and run.matrix:
        yield summary.task_table(run.results)


def _matrix(run: RunRecord, accuracies: Rows, caption: str) -> Table:
    names = ["nothing (zero-shot)"]
    names += [stage_title(i, run.tasks, run.stages) for i in range(len(accuracies))]
    named = len(run.tasks) <= NAMED_COLUMNS
    tasks = (f"{j} {task}" if named else str(j) for j, task in enumerate(run.tasks, start=1))
    rows = zip(names, [run.zero_shot, *accuracies], strict=True)
    cells = tuple((name, *map(percent, row)) for name, row in rows)
    return Table(caption, ("after", *tasks), cells, shaded=True)


def _clients(run: RunRecord) -> Iterator[html.Block]:
    log, own = run.log, run.results.per_client if run.results else {}
    idle: dict[str, Counter[str]] = {number: Counter() for number in log.clients}
    for event in log.of("client_idle"):
        idle[str(event["client"])][IDLE.get(event["code"], str(event["code"]))] += 1
    rows = []
    for number in log.clients:
        replies = {key: by[number] for key, by in log.replies.items() if number in by}
        good = [e for e in replies.values() if e["event"] == "client_finished"]
        used = len(good) - sum((key, number) in log.excluded for key in replies)
        seconds = sum(float(event.get("seconds", 0.0)) for event in good)
        examples = {str(e["task"]): float(e["num_examples"]) for e in good if "num_examples" in e}
        # Under privacy each client weighs 1, whatever it has.
        told = any(count != 1 for count in examples.values())
        found = own.get(number)
        start = [value for value in found.zero_shot if value is not None] if found else []
        rows.append(
            (
                log.name(number),
                html.whole(sum(examples.values()) if told else None),
                html.whole(sum(found.test_examples) if found else None),
                percent(fmean(start) if start else None),
                percent(found.average_accuracy if found else None),
                html.whole(used),
                html.whole(len(replies) - used),
                html.time(seconds / len(good) if seconds else None),
                ", ".join(f"{why} ({times} ×)" for why, times in idle[number].items()) or DASH,
            )
        )
    known = [found.average_accuracy for found in own.values() if found.average_accuracy is not None]
    if known:
        mean, deviation = f"{percent(fmean(known))} %", f"{percent(pstdev(known))} points"
        yield html.Facts(
            (("mean over clients", mean), ("standard deviation over clients", deviation))
        )
    else:
        yield html.Text("Accuracy of each client is known when the run has finished.")
    columns = (
        *("client", "training examples", "test examples", "zero-shot", "accuracy"),
        *("replies used", "left out", "seconds a reply", "took no part"),
    )
    yield Table("Each client; accuracies in %", columns, tuple(rows))


def _rounds(run: RunRecord) -> Iterator[html.Block]:
    done = run.log.done
    if not done:
        yield html.Text("No round has ended.")
        return
    facts = [("rounds played", f"{len(done)} of {run.log.planned}")]
    facts.append(("starts", html.whole(len(run.log.of("run_started")))))
    if run.results:
        phases = run.results.seconds.items()
        facts += [(f"time, {phase}", html.time(seconds)) for phase, seconds in phases]
        facts.append(("peak memory", size(run.results.peak_rss_bytes)))
    yield html.Facts(tuple(facts))
    if any(each.loss for each in done) and len(done) > 1:
        numbers = [each.number for each in done]
        yield html.lines(
            "Mean training loss of each round.",
            [html.Curve("", numbers, [each.loss for each in done])],
            ("round", "mean training loss"),
            from_zero=True,
        )
    columns = (
        *("round", "stage", "phase", "tasks", "clients", "mean loss", "off the exact mean"),
        *("time", "sent per client", "received per client"),
    )
    yield Table("Every round that has ended", columns, tuple(map(_round, done)))
    yield html.Text(
        "Off the exact mean: relative difference of what the aggregation rule gives from the exact "
        "mean of the updates; 0 where nothing is aggregated."
    )


def _round(one: Round) -> tuple[str, ...]:
    return (
        str(one.number),
        str(one.stage + 1),
        PHASES.get(one.phase, one.phase),
        ", ".join(one.tasks),
        f"{one.used} of {one.asked}",
        html.decimal(one.loss, 4),
        html.decimal(0.0 if one.error is not None and one.error < ROUNDING else one.error),
        html.time(one.seconds),
        size(one.bytes_up),
        size(one.bytes_down),
    )


def _privacy(run: RunRecord) -> Iterator[html.Block]:
    config, told = run.experiment.privacy, run.privacy
    if sums := membership_text(run.experiment, run.log.label_records, len(run.tasks)):
        yield html.Text(f"Class sums, {sums}.")
    if config.mechanism == "none":
        yield html.Text(
            "No mechanism protects the updates. No text leaves its client, but an adapter may tell "
            "of the records that it was trained on: no epsilon holds. The experiment private shows "
            "how to change that.",
            "warn",
        )
        return
    if told.simulation_only:
        yield html.Text(
            "Simulation only: noise came from a seed, so that the run can be repeated. Whoever "
            "knows the seed can take the noise off: nothing is guaranteed.",
            "warn",
        )
    if warning := summary.large_delta(told):
        yield html.Text(f"{warning[0].upper()}{warning[1:]}.", "warn")
    yield html.Text(f"Mechanism {summary.privacy_text(told)}.")
    limit = html.decimal(config.target_epsilon, 4)
    rest = (limit, html.at_most(told.delta), told.unit_text, extent(told.disjoint_tasks))
    if told.epsilon:
        yield Table(
            "Spending of each client",
            ("client", "epsilon spent", "limit", "delta", "unit", "composed over"),
            tuple(
                (run.log.name(n), html.at_most(spent, 4), *rest)
                for n, spent in told.epsilon.items()
            ),
        )
    delta = f"delta = {config.target_delta:g}" if config.target_delta else "the client's own delta"
    yield html.Facts(
        (
            ("unit of privacy", told.unit_text),
            (
                "limit of the experiment",
                f"epsilon = {limit} for all that a client's ledger holds, at {delta}, per "
                f"{told.unit_text}; at a site, its own policy may set a lower one",
            ),
            ("assumed honest", told.trust),
            ("clipping bound of a gradient", html.decimal(config.max_grad_norm)),
            ("counts of right answers leave", config.metrics),
        )
    )


def _faults(run: RunRecord) -> Iterator[html.Block]:
    alike: dict[tuple[str, str, str], list[RunEvent]] = {}
    for event in run.log.of(*FAULTS):
        if event.get("code") != "no-data":  # by the division of the data, and no fault
            what, client = FAULTS[event["event"]], run.log.name(event.get("client", ""))
            alike.setdefault((what, client, _why(event)), []).append(event)
    if not alike:
        yield html.Text("None: every reply that was asked for came and was used.")
        return
    rows = []
    for (what, client, why), events in alike.items():
        first = f"{datetime.fromtimestamp(events[0]['time'], UTC):%Y-%m-%d %H:%M:%S}"
        rounds = ", ".join(dict.fromkeys(str(e["round"]) for e in events if e.get("round")))
        rows.append((what, client or DASH, html.whole(len(events)), rounds or DASH, first, why))
    columns = ("what", "client", "times", "rounds", "first (UTC)", "why")
    yield Table("What went wrong, in order", columns, tuple(rows))


def _why(event: RunEvent) -> str:
    tasks = event.get("task") or ", ".join(event.get("tasks", ()))
    if event["event"] == "weight_cut":
        return f"weighs {event['weight']:g}, not what it claimed"
    if event["event"] == "counts_cut":
        return f"claimed more test rows than count, of {tasks}"
    if event["event"] == "class_means_doubted":
        return f"{event['by']} of {event['of']} clients answer worse with those of {tasks}"
    return reason_in(event) or tasks


def _settings(run: RunRecord) -> Iterator[html.Block]:
    results = run.results
    if results:
        known = (("commit", results.commit or "not known"), ("finished (UTC)", results.finished))
        yield html.Facts((*known, *results.versions.items()))
    usual = settings_text(Experiment())
    rows = tuple(
        (key, value, usual[key])
        for key, value in settings_text(run.experiment).items()
        if value != usual[key]
    )
    yield Table("Settings other than the defaults", ("key", "value", "default"), rows)


SECTIONS: Mapping[str, tuple[str, Callable[[RunRecord], Iterator[html.Block]]]] = {
    "summary": ("Summary", _summary),
    "accuracy": ("Accuracy on every task", _accuracy),
    "labels": ("Labels", label_blocks),
    "clients": ("Clients", _clients),
    "rounds": ("Rounds", _rounds),
    "privacy": ("Privacy", _privacy),
    "faults": ("Faults", _faults),
    "settings": ("Settings and versions", _settings),
}
