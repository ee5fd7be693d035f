"""What several runs say together, against counts made by hand."""

import pytest

from deal_core.config.data import StreamConfig
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.measures import EVERYBODY, make_results
from server.plan import make_plan
from server.results import History
from simulations.study.outcome import outcome, pooled_own, together
from tests.simulations.runs import at


def run(tasks, *evaluations, seconds=1.0, peak=1):
    history = History(
        evaluations=evaluations,
        bytes_up=(10.0, 20.0),
        bytes_down=(5.0,),
        seconds={"train": seconds},
        peak_rss_bytes=peak,
    )
    at_once = len(evaluations) - 1 < len(tasks)
    schedule = StreamConfig(schedule="joint" if at_once else "synchronous")
    experiment = Experiment(stream=schedule)
    return make_results(experiment, make_plan(experiment, tasks, list(evaluations[0])), history)


START = {"0": [[1, 10], [0, 10]], "1": [[2, 10], [10, 10]]}


def test_of_one_run_it_is_what_the_run_says_among_its_own_labels_and_among_all():
    start = {"0": [[1, 10, 1], [0, 10, 0]], "1": [[2, 10, 2], [10, 10, 10]]}
    first = {"0": [[8, 10, 8], [1, 10, 0]], "1": [[8, 10, 8], [1, 10, 2]]}
    last = {"0": [[4, 10, 2], [7, 10, 5]], "1": [[8, 10, 4], [9, 10, 3]]}
    results = run(["a", "b"], start, first, last)
    found = outcome(results)
    among_all, said = found.class_incremental, results.class_incremental
    assert found.accuracy_matrix == results.accuracy_matrix
    assert found.average_accuracy == results.average_accuracy == pytest.approx(0.7)
    assert found.learning_accuracy == pytest.approx((0.8 + 0.8) / 2)
    assert found.backward_transfer == results.backward_transfer == pytest.approx(-0.2)
    assert found.forward_transfer == results.forward_transfer == pytest.approx(0.1 - 0.5)
    assert found.worst_client == pytest.approx((0.4 + 0.7) / 2)
    assert (found.bytes_up, found.bytes_down, found.seconds) == (30.0, 5.0, 1.0)
    assert among_all.accuracy_matrix == said.accuracy_matrix == [[0.8, 0.1], [0.3, 0.4]]
    assert among_all.average_accuracy == said.average_accuracy == pytest.approx(0.35)
    assert among_all.backward_transfer == said.backward_transfer == pytest.approx(-0.5)
    assert among_all.forward_transfer == said.forward_transfer == pytest.approx(0.1 - 0.5)
    assert among_all.forgetting == said.forgetting == pytest.approx(0.5)
    assert among_all.worst_client == pytest.approx((0.2 + 0.5) / 2)


def test_tasks_learnt_at_once_or_each_alone_have_no_transfer():
    one = run(["a"], {"0": [[1, 10]], "1": [[1, 10]]}, {"0": [[9, 10]], "1": [[5, 10]]}, peak=7)
    two = run(["b"], {"0": [[3, 10]], "1": [[0, 0]]}, {"0": [[6, 10]], "1": [[0, 0]]}, seconds=2.0)
    joint = outcome(run(["a", "b"], START, {"0": [[4, 10], [7, 10]], "1": [[8, 10], [9, 10]]}))
    assert joint.average_accuracy == joint.learning_accuracy == pytest.approx(0.7)
    assert joint.backward_transfer is joint.forward_transfer is joint.forgetting is None
    found = together([one, two])
    assert found.tasks == ["a", "b"]
    assert found.accuracy_matrix == [[0.7, 0.6]]
    assert found.zero_shot == {"a": 0.1, "b": 0.3}
    assert found.average_accuracy == pytest.approx(0.65)
    assert found.worst_client == pytest.approx(0.5)  # client 1 has tests of task a alone
    assert (found.seconds, found.peak_rss_bytes, found.bytes_up) == (3.0, 7, 60.0)
    assert found.forgetting is None


def test_each_client_alone_is_judged_on_its_own_tests_every_example_once():
    first = {"0": [[9, 10], [0, 0]], "1": [[1, 30], [3, 10]]}
    last = {"0": [[7, 10], [0, 0]], "1": [[2, 30], [5, 10]]}
    zero = run(["a", "b"], START, first, last)
    first = {"0": [[0, 10], [0, 0]], "1": [[24, 30], [2, 10]]}
    last = {"0": [[1, 10], [0, 0]], "1": [[21, 30], [8, 10]]}
    one = run(["a", "b"], START, first, last)
    found = pooled_own([zero, one])
    assert found.accuracy_matrix == [
        pytest.approx([(9 + 24) / 40, 2 / 10]),
        pytest.approx([(7 + 21) / 40, 8 / 10]),
    ]
    assert found.average_accuracy == pytest.approx((28 / 40 + 0.8) / 2)
    assert found.backward_transfer == pytest.approx(28 / 40 - 33 / 40)
    assert found.worst_client == pytest.approx(min(0.7, (0.7 + 0.8) / 2))
    everybody = [(9 / 40 + 5 / 10) / 2, (22 / 40 + 8 / 10) / 2]
    assert found.on_all_tests == pytest.approx(sum(everybody) / 2)
    assert (found.bytes_up, found.bytes_down) == (30.0, 5.0)  # of each client


def test_each_client_alone_is_judged_among_all_labels_on_its_own_tests_as_well():
    start = {"0": [[0, 10, 0], [0, 0, 0]], "1": [[0, 30, 0], [0, 10, 0]]}
    zero = run(["a", "b"], start, {"0": [[9, 10, 6], [0, 0, 0]], "1": [[1, 30, 1], [3, 10, 3]]})
    one = run(["a", "b"], start, {"0": [[0, 10, 0], [0, 0, 0]], "1": [[24, 30, 18], [2, 10, 1]]})
    found = pooled_own([zero, one]).class_incremental
    assert found.accuracy_matrix == [pytest.approx([(6 + 18) / 40, 1 / 10])]
    assert found.worst_client == pytest.approx((0.6 + 0.1) / 2)
    silent = run(["a", "b"], START, START)  # has not counted among all labels
    assert pooled_own([zero, silent]).class_incremental is None


def test_of_clients_alone_in_their_own_orders_a_task_is_learnt_when_its_last_learner_was():
    orders = {"0": ("a", "b"), "1": ("b", "a")}
    parts = []
    for client in (0, 1):
        experiment = Experiment(
            federation={"clients": 2, "participants": (client,)},
            stream={"schedule": "per-client", "orders": orders},
        )
        history = History(evaluations=(START, START, START), bytes_up=(1.0,), bytes_down=(1.0,))
        plan = make_plan(experiment, ["a", "b"], ["0", "1"])
        parts.append(make_results(experiment, plan, history))
    found = pooled_own(parts)
    assert (found.begun, found.learnt) == ([0, 0], [1, 1])


@pytest.mark.parametrize("combine", [together, pooled_own, lambda parts: outcome(parts[0])])
def test_runs_without_counts_are_refused_in_one_line(combine):
    results = run(["a"], START, START).model_copy(update={"accuracy_matrix": []})
    with pytest.raises(UserError, match=r"its clients kept their counts.*remove that folder"):
        combine([results, results])


SUMMED = {EVERYBODY: [[5, 10, 4], [7, 10, 6]]}
"""What a secure sum tells: nothing of single clients."""


def test_counts_of_all_clients_together_are_enough():
    results = run(["a", "b"], SUMMED, SUMMED, SUMMED)
    assert not results.per_client
    found = outcome(results)
    assert found.average_accuracy == pytest.approx(0.6)
    assert found.class_incremental.average_accuracy == pytest.approx(0.5)
    assert found.worst_client is None
    parts = [run([task], {EVERYBODY: [[5, 10]]}, {EVERYBODY: [[8, 10]]}) for task in ("a", "b")]
    assert together(parts).accuracy_matrix == [[0.8, 0.8]]
    assert together(parts).worst_client is None


def test_clients_alone_need_counts_of_their_own():
    """Of the last evaluation, and at every stage those of one of them."""
    last = {"0": [[7, 10], [6, 10]], "1": [[2, 10], [5, 10]]}
    whole = run(["a", "b"], START, last, last)
    missing = run(["a", "b"], START, last, {"0": last["0"]})
    others = [run(["a", "b"], START, {name: last[name]}, last) for name in ("1", "0")]
    summed = run(["a", "b"], SUMMED, SUMMED, SUMMED)
    for parts, client in (
        ([whole, missing], 1),
        ([missing, missing], 1),
        (others, 0),
        ([summed, summed], 0),
    ):
        parts = [
            part.model_copy(update={"config": at(part.config, f"runs/client-{k}")})
            for k, part in enumerate(parts)
        ]
        with pytest.raises(UserError, match=f"runs/client-{client}: .* client {client} .*remove"):
            pooled_own(parts)


def test_counts_that_did_not_arrive_are_no_wrong_answers():
    last = {"0": [[7, 10], [6, 10]], "1": [[2, 10], [5, 10]]}
    whole = run(["a", "b"], START, last, last)
    lost = run(["a", "b"], START, {"0": last["0"]}, last)  # client 1 was silent once
    assert pooled_own([whole, lost]).accuracy_matrix == [
        pytest.approx([0.7, 0.6]),
        pytest.approx([0.45, 0.55]),
    ]
