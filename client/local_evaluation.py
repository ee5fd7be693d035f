"""The right answers that a client counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from client.client_context import ClientContext
from client.gate import check_tasks
from client.rehearsal import rehearse_answers, rehearse_embeddings
from client.resources import ClientTask, Workbench
from deal_core.lora.state import State
from deal_core.models import has_label_logits
from deal_core.privacy.events import GROUP
from deal_core.privacy.interface import Counts, Refusal, UpdateRequest
from deal_core.privacy.policy import metrics_allowed
from deal_core.randomness import seeded
from deal_core.training.evaluation import (
    AnswerSpace,
    Scorer,
    answer_space,
    by_heads,
    by_name,
    by_names_told,
    count_both,
    count_correct,
)
from deal_core.training.loop import load_state
from deal_core.training.text_overlap import TEXT_MEASURES
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import CORRECT, CORRECT_ALL, EXAMPLES, count_names


def local_evaluation(
    bench: Workbench,
    client_context: ClientContext,
    state: State,
    instruction: Instruction,
    request: str,
    masked: bool = False,
) -> Counts:
    """Return ``correct``, ``examples`` and, where the model scores all labels at once,
    ``correct_all`` on the client's test share of every task asked for, as the privacy mechanism
    lets them go; ``masked``: nothing is seen of them but their sum over clients.

    Raises:
        Refusal: they do not leave the site.
    """
    check_tasks(instruction, bench)
    asked = bench.experiment.privacy.metrics
    allowed = metrics_allowed(asked, client_context.site.policy, masked)
    if masked and allowed == "clear":
        require_enough_to_count(bench, client_context, instruction)
    ask = _request(bench, client_context.client, instruction, request, masked)
    count = partial(
        exact_counts, bench, client_context.client, state, instruction, allowed == "noised"
    )
    return bench.mechanism.count(ask, client_context.site, count)


def exact_counts(
    bench: Workbench, client: int, state: State, instruction: Instruction, noised: bool
) -> Counts:
    """Return the counts as they are; ``noised``: noise is going to be added to them, so that a
    record, or group, moves each by at most 1, and no other record's answer."""
    if noised:  # of every task, whether the site has test records of it or not
        load_state(bench.model, state)
        for task in instruction.tasks:
            rehearse_task(bench, task)
    by_group = noised and bench.mechanism.unit == GROUP
    all_labels = has_label_logits(bench.experiment.model)
    learnt = instruction.learnt if all_labels else None
    shares = {task: bench.task(task, client) for task in instruction.tasks}
    right = [
        right_answers(bench, task, share, state, learnt, by_group, noised)
        for task, share in shares.items()
    ]
    texts = bench.experiment.data.generation  # their measure is a sum of shares
    counts: dict[str, list[float]] = {
        CORRECT: [float(own) if texts else own for own, _ in right],
        EXAMPLES: [
            len(set(share.test_groups)) if by_group else len(share.test)
            for share in shares.values()
        ],
    }
    return {**counts, CORRECT_ALL: [both for _, both in right]} if all_labels else counts


def _request(
    bench: Workbench, client: int, instruction: Instruction, request: str, masked: bool
) -> UpdateRequest:
    """What the privacy mechanism must know of the evaluation."""
    return UpdateRequest(
        request=f"evaluate {request}",
        client=str(client),
        task="",
        phase="evaluate",
        stage=instruction.stage,
        server_round=instruction.server_round,
        data=(),
        record_ids=(),
        records=lambda: bench.records(client),
        site_records=lambda: bench.site_records(client),
        ids=lambda: (),
        learning_rate=0.0,
        generator=seeded(bench.experiment.run.seed, "evaluate", client, instruction.stage),
        evaluated=len(instruction.tasks),
        masked=masked,
        counted=count_names(has_label_logits(bench.experiment.model)),
        grouping=bench.grouping("", client),
    )


def require_enough_to_count(
    bench: Workbench, client_context: ClientContext, instruction: Instruction
) -> None:
    """Check that the site has test records of every task that is asked about: whoever has none adds
    zeros, and a sum over three sites might be one's.

    Raises:
        Refusal: it has fewer of one than the site's policy lets go.
    """
    policy = client_context.site.policy
    if policy is None:
        return
    tests = [len(bench.task(each, client_context.client).test) for each in instruction.tasks]
    if min(tests, default=0) < policy.min_records:
        raise Refusal("no-data", f"fewer than {policy.min_records} test records of a task")


def rehearse_task(bench: Workbench, task: str) -> None:
    """Try out on constant texts what the answers to a task's test records take.

    Raises:
        RehearsalFailed: it does not work.
    """
    labels, asks = bench.labels(task), bench.instruction(task)
    rehearse_answers(bench, labels, asks)
    if bench.statistics is not None and labels:
        rehearse_embeddings(bench, labels, asks, bench.statistics.layers)


def right_answers(
    bench: Workbench,
    task: str,
    share: ClientTask,
    state: State,
    learnt: Sequence[str] | None,
    by_group: bool = False,
    alone: bool = False,
) -> tuple[float, float]:
    """Return how many answers are right among the task's own labels, and among those of all tasks
    ``learnt`` as well (0 where that is None: not asked about); not counted again while nothing that
    they depend on has changed. By group: each counts as one, by the share of its answers that is
    right, so that no group changes a count by more than 1. ``alone``: each text is asked about by
    itself, so that no record changes the answer to another."""
    weights = group_weights(share.test_groups) if by_group else None

    def count() -> tuple[float, float]:
        load_state(bench.model, state)
        if learnt is None and task not in state.heads:
            measure = TEXT_MEASURES[bench.experiment.data.measure(task)]
            return count_correct(bench.model, share.test, share.labels, weights, alone, measure), 0
        spaces = {name: bench.labels(name) for name in learnt or ()}
        space = answer_space(task, share.labels, spaces)
        score = _scorer(bench, task, share, state, space, learnt)
        return count_both(score, share.test, space, weights, alone)

    if not share.test:
        return 0, 0
    key = state, learnt, by_group, alone
    right: tuple[float, float] = share.cache.get_or_compute("right", key, count)
    return right


def group_weights(groups: Sequence[int]) -> list[float]:
    """Return what each test example counts, ``(examples,)``, so that those of a group count 1
    together."""
    sizes = Counter(groups)
    return [1 / sizes[number] for number in groups]


def _scorer(
    bench: Workbench,
    task: str,
    share: ClientTask,
    state: State,
    space: AnswerSpace,
    learnt: Sequence[str] | None,
) -> Scorer:
    """Return scores by the names of labels; by heads where the task has one, with the names beside
    them if the method says so. A task that has been learnt and has none is answered by those of
    others where nobody tells the task, as by :class:`~deal_core.inference.predictor.Predictor`."""
    names = by_name(bench.model, share.test, [label for _, label in space.columns])
    statistics, headless = bench.statistics, task not in state.heads
    among_heads = task in (learnt or ()) and any(other in state.heads for other in learnt or ())
    if statistics is None or (headless and not among_heads):
        return names
    vectors = bench.vectors(share, "test", statistics)
    scores = by_heads(vectors, space, state.heads, names, statistics.names)
    return by_names_told(names, scores, space) if headless else scores
