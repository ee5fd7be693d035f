"""The right answers that a client counts, and what a site thinks of class means before they are
used: one bit, from records that it holds back.

Nobody can look into a masked sum, and one site can ruin it. But each site has records that are in
no sum and that nothing is learnt from. Where these are answered worse with the class means than by
the names of labels, it says so; it says one thing in a stage, whatever it is asked.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from client.gate import require
from client.identity import ClientRequest, write_log
from client.runtime import ClientRuntime, ClientTask
from deal_core.atomic_write import atomic_write
from deal_core.lora.adapter import fingerprint
from deal_core.lora.state import State
from deal_core.methods import is_class_incremental
from deal_core.models import has_label_logits
from deal_core.models.generating import GeneratingModel
from deal_core.privacy.events import CLEAR_COUNTS, VERDICT, unprotected_event
from deal_core.training import evaluation as scoring
from deal_core.training.loop import Cache, load_state
from deal_core.training.text_overlap import TEXT_MEASURES, TextMeasure
from deal_core.wire.records import CORRECT, CORRECT_ALL, EXAMPLES

Counts = Mapping[str, Sequence[float]]
"""``correct``, ``examples`` and, where the model scores all labels at once, ``correct_all``: an
entry a task each (:mod:`deal_core.wire.records`)."""
SAME = TextMeasure("accuracy", lambda answer, right: answer in right)
"""Of a label."""
CLEARLY = 0.2
"""Share of a new task's records that must be answered worse for the site to be against it."""


def local_evaluation(granted: ClientRequest, masked: bool = False) -> Counts:
    """Return ``correct``, ``examples`` and, where the model scores all labels at once,
    ``correct_all`` on the client's test share of every task asked for; a real site notes in its
    ledger that they leave. ``masked``: nothing is seen of them but their sum over clients; whoever
    has no test records adds zeros, and a sum over three sites might be one's.

    Raises:
        Refusal: too few test records for a sum.
    """
    client, runtime, instruction = granted.client, granted.runtime, granted.instruction
    shares = {task: runtime.task(task, client.number) for task in instruction.tasks}
    if masked:
        own = (runtime.task(task, client.number) for task in runtime.tasks)  # asked about or not
        fewest = min((len(share.test) for share in own), default=0)
        require(granted.asked(records=fewest), "test records")
    all_labels = is_class_incremental(runtime.experiment)
    learnt = instruction.learnt if all_labels else None
    right = [
        right_answers(runtime, task, share, granted.state, learnt) for task, share in shares.items()
    ]
    kind = float if any(isinstance(n, float) for both in right for n in both) else int
    counts: dict[str, list[float]] = {
        CORRECT: [kind(own) for own, _ in right],
        EXAMPLES: [scoring.examples_in(runtime.model, share.test) for share in shares.values()],
    }
    if all_labels:
        counts[CORRECT_ALL] = [kind(both) for _, both in right]
    if not client.simulated:
        place = "", "evaluate", instruction.stage, instruction.server_round
        client.site.ledger().note(unprotected_event(client.run, CLEAR_COUNTS, place))
    return counts


def right_answers(
    runtime: ClientRuntime, task: str, share: ClientTask, state: State, learnt: Sequence[str] | None
) -> tuple[float, float]:
    """Return how many answers are right among the task's own labels, and among those of all tasks
    ``learnt`` as well (0 where that is None: not asked about); not counted again while nothing that
    they depend on has changed."""

    def count() -> tuple[float, float]:
        if runtime.statistics is not None and runtime.statistics.routes:
            return _routed(runtime, task, share, state, learnt or ())
        load_state(runtime.model, state.view(state.place_of(task)))
        if learnt is None and task not in state.heads:
            measure = TEXT_MEASURES.get(runtime.experiment.data.measure(task), SAME)
            return scoring.count_correct(runtime.model, share.test, share.labels, measure), 0
        spaces = {name: runtime.labels(name) for name in learnt or ()}
        space = scoring.answer_space(task, share.labels, spaces)
        score = _scorer(runtime, task, share, state, space, learnt)
        return scoring.count_both(score, share.test, space)

    if not share.test:
        return 0, 0
    right: tuple[float, float] = share.cache.get_or_compute("right", (state, learnt), count)
    return right


def _routed(
    runtime: ClientRuntime, task: str, share: ClientTask, state: State, learnt: Sequence[str]
) -> tuple[float, float]:
    """Return right answers where each task has a component: told, by its own; not told, by that of
    the task, of those ``learnt``, which the router takes a text for, under that task's prompt (0
    where the task itself is not learnt). Told, a task is not asked again until its own component
    changes."""
    model, experiment, statistics = runtime.model, runtime.experiment, runtime.statistics
    assert isinstance(model, GeneratingModel)
    assert statistics is not None
    measure = SAME if share.labels else TEXT_MEASURES[experiment.data.measure(task)]
    total = round if share.labels else float  # labels are right or wrong
    weight, vectors = statistics.names_weight(False), runtime.vectors(share, "test", statistics)
    right = [(share.labels[each.target],) if share.labels else each.right for each in share.test]

    def answered(other: str, places: Sequence[int]) -> list[float]:
        load_state(model, state.view(state.place_of(other)))
        labels, items = runtime.labels(other), [share.test[place] for place in places]
        prompts = model.asked(items, labels, runtime.instruction(other))
        asked = [replace(p, right=right[n]) for p, n in zip(prompts, places, strict=True)]
        score = scoring.by_name(model, asked, labels)
        if labels and other in state.heads:
            space, head = scoring.answer_space(other, labels, {}), {other: state.heads[other]}
            score = scoring.by_heads(vectors[list(places)], space, head, score, weight)

        def answer(batch: Sequence[int]) -> list[str]:
            if not labels:
                return model.write([asked[k] for k in batch])
            return [
                labels[place] for place in scoring.finite_scores(score, batch).argmax(1).tolist()
            ]

        return scoring.text_shares(answer, asked, measure)

    parts = state.view(state.place_of(task)).parts()
    changing = [each for each in parts if any(f.B.any() for f in each.layers.values())]
    basis = [fingerprint(each) for each in changing], task in state.heads
    everything = range(len(share.test))
    told = share.cache.get_or_compute("told", basis, lambda: answered(task, everything))
    heads = {name: state.heads[name] for name in learnt if name in state.heads}
    if task not in heads:
        return total(math.fsum(told)), 0
    found, elsewhere = list(told), dict[str, list[int]]()
    for place, other in enumerate(scoring.route(vectors, heads)):
        if other != task:
            elsewhere.setdefault(other, []).append(place)
    for other, places in elsewhere.items():
        for place, part in zip(places, answered(other, places), strict=True):
            found[place] = part
    return total(math.fsum(told)), total(math.fsum(found))


def _scorer(
    runtime: ClientRuntime,
    task: str,
    share: ClientTask,
    state: State,
    space: scoring.AnswerSpace,
    learnt: Sequence[str] | None,
) -> scoring.Scorer:
    """Return scores by the names of labels; by heads where the task has one, with the names beside
    them if the method says so. A task that has been learnt and has none is answered by those of
    others where nobody tells the task, as by :class:`~deal_core.inference.predictor.Predictor`."""
    names = scoring.by_name(runtime.model, share.test, [label for _, label in space.columns])
    statistics, headless = runtime.statistics, task not in state.heads
    among_heads = task in (learnt or ()) and any(other in state.heads for other in learnt or ())
    if statistics is None or (headless and not among_heads):
        return names
    vectors = runtime.vectors(share, "test", statistics)
    weight = statistics.names_weight(runtime.model.has_label_logits)
    scores = scoring.by_heads(vectors, space, state.heads, names, weight)
    return scoring.by_names_told(names, scores, space) if headless else scores


def verdict(granted: ClientRequest) -> bool:
    """Return whether records that are held back are answered better without the heads of the state;
    the ``tasks`` of the request are those whose class means are new. A real site notes in its
    ledger that this leaves, and in its log what."""
    client, asked = granted.client, granted.instruction
    path, stage = client.kept / "verdicts.json", str(asked.stage)
    said: dict[str, bool] = json.loads(path.read_text()) if path.exists() else {}
    if stage not in said:
        said[stage] = _worse(granted.runtime, client.number, granted.state, asked.tasks)
        if client.file is not None:
            place = "", asked.phase, asked.stage, asked.server_round
            client.site.ledger().note(unprotected_event(client.run, VERDICT, place))
            tasks = list(asked.tasks)
            write_log(client.file, VERDICT, tasks=tasks, stage=asked.stage, worse=said[stage])
        atomic_write(path, json.dumps(said))
    return said[stage]


def _worse(runtime: ClientRuntime, client: int, state: State, new: Sequence[str]) -> bool:
    """Return whether the heads make answers worse by more than chance explains: of a new task's own
    a share of ``CLEARLY``, of all together one standard deviation of a sign test."""
    if runtime.statistics is not None and runtime.statistics.routes:
        return _routed_worse(runtime, client, state, new)
    known, names = tuple(state.heads), replace(state, heads={})
    learnt = known if has_label_logits(runtime.experiment.model) else None
    gained, records = 0.0, 0
    for task in known:
        share = runtime.task(task, client)
        held = replace(share, test=share.held, cache=Cache())
        own, everywhere = right_answers(runtime, task, held, state, learnt)
        own_names, everywhere_names = right_answers(runtime, task, held, names, learnt)
        gained += own - own_names + everywhere - everywhere_names
        records += len(share.held)
        if task in new and own - own_names < -CLEARLY * len(share.held):
            return True
    return gained < -math.sqrt(records)


def _routed_worse(runtime: ClientRuntime, client: int, state: State, new: Sequence[str]) -> bool:
    """Return whether the heads of new tasks take texts from earlier ones: of one task more than
    half, as two tasks of the same texts would divide them, or of all together more than they bring;
    by one standard deviation of a sign test. Nothing is written for it."""
    assert runtime.statistics is not None
    before = {task: head for task, head in state.heads.items() if task not in new}
    gained, records = 0, 0
    for task in state.heads:
        share = runtime.task(task, client)
        if not share.held:
            continue
        held = replace(share, test=share.held, cache=Cache())
        vectors = runtime.vectors(held, "test", runtime.statistics)
        own = scoring.route(vectors, state.heads).count(task)
        own -= scoring.route(vectors, before).count(task) if before else 0
        if -own > len(held.test) / 2 + math.sqrt(len(held.test)) / 2:
            return True
        gained += own
        records += len(held.test)
    return gained < -math.sqrt(records)
