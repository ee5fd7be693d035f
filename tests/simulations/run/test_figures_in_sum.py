"""Counts of right answers and training losses that leave in a secure sum alone: the same accuracies
and the same mean, nobody's own."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from client.egress import check_reply
from deal_core.errors import UserError
from deal_core.lora.payload import WORSE, PayloadError
from deal_core.privacy.policy import Policy, counts_leave, figures_allowed
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum.layout import Layout, SumField
from deal_core.secure_sum.messages import BelowThreshold, ProtocolError
from deal_core.wire.records import CORRECT, CORRECT_ALL, EXAMPLES
from deal_core.wire.secure_layout import (
    LARGEST_LOSS,
    LOSS,
    LOSS_KEPT,
    counts_layout,
    loss_fields,
    loss_values,
    mean_loss,
    without_loss,
)
from server.clients import Clients, Roster
from server.evaluation import summed_rows
from server.folder import EventLog
from server.plan import Step
from server.results import read_results
from server.secure_aggregation import SecureAggregation
from simulations.engines.worker_pool import assume_identity
from simulations.run.run_log import RunLog
from tests.simulations.run.secure_runs import SHORT, rounds
from tests.simulations.runs import at, run_in_process
from tests.sizes import TINY

pytestmark = pytest.mark.usefixtures("one_model")

PLAIN = (
    "federation.clients=3",
    "federation.rounds=1",
    "federation.deadline_seconds=5",
    "method.name=sequential",
    "aggregation.rule=ffa",
    'data.partition.kind="iid"',
    *TINY,
)
SUMMED = (*PLAIN, "aggregation.secure=true", "privacy.metrics=summed")


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory):
    """A run with summed counts, all that left its clients, and the same run in the clear."""
    left = []

    def see(reply):
        left.append(reply)
        return reply

    summed, clear = (tmp_path_factory.mktemp(name) for name in ("summed", "clear"))
    events = run_in_process(at(make_experiment(*SUMMED), summed), see)
    plain = run_in_process(at(make_experiment(*PLAIN), clear))
    return events, plain, left, read_results(summed), read_results(clear)


def test_accuracies_are_those_of_counts_in_the_clear(finished):
    *_, summed, clear = finished
    for name in ("accuracy_matrix", "zero_shot", "forward_transfer"):
        assert getattr(summed, name) == getattr(clear, name)
    assert summed.class_incremental.accuracy_matrix == clear.class_incremental.accuracy_matrix


@pytest.mark.parametrize("settings", [PLAIN, SUMMED], ids=["clear", "summed"])
def test_what_is_evaluated_now_and_then_has_the_same_accuracies(
    make_experiment, tmp_path, settings
):
    three = (*settings, 'data.tasks=["laboratory","surgery","medicine"]')
    run_in_process(at(make_experiment(*three), tmp_path / "all"))
    run_in_process(at(make_experiment(*three, "stream.evaluate_every=9"), tmp_path / "some"))
    found, some = read_results(tmp_path / "all"), read_results(tmp_path / "some")
    first, second, last = found.accuracy_matrix
    assert some.accuracy_matrix == [[*first[:2], None], [None, *second[1:]], last]
    for name in ("zero_shot", "average_accuracy", "backward_transfer", "forward_transfer"):
        assert getattr(some, name) == getattr(found, name)


def test_clients_vote_on_class_means_where_counts_are_summed(make_experiment, tmp_path):
    means = "method.name=deal", "method.prototype.enabled=on"
    experiment = make_experiment(*SUMMED, *means, 'data.tasks=["laboratory"]')
    left = []
    run_in_process(at(experiment, tmp_path), lambda reply: left.append(reply) or reply)
    votes = [reply for reply in left if WORSE in reply.content.metric_records.get("metrics", ())]
    assert len(votes) == 3


def test_the_mean_loss_is_that_of_losses_in_the_clear(finished):
    events, plain, *_ = finished
    told = [event["loss"] for event in events if event["event"] == "loss_summed"]
    own = [event for event in plain if event["event"] == "client_finished"]
    means = [np.mean([e["loss"] for e in own if e["stage"] == stage]) for stage in (0, 1)]
    assert len({event["loss"] for event in own}) == 6
    assert told == pytest.approx(means, abs=1e-5)
    assert not any("loss" in event for event in events if "client" in event)
    assert [one.loss for one in RunLog(events).rounds] == told


def test_nobody_knows_the_accuracy_at_one_client(finished):
    events, _, left, summed, clear = finished
    assert len(clear.per_client) == 3
    assert summed.per_client == {}
    names = {CORRECT, CORRECT_ALL, EXAMPLES}
    for reply in left:
        assert not any(names & set(record) for record in reply.content.values())
    assert sum(event["event"] == "evaluated" for event in events) == 3


@pytest.mark.slow
def test_a_client_whose_counts_are_lost_takes_the_evaluation_along_and_not_the_run(
    make_experiment, tmp_path
):
    """Of three sites none may be missing; what is not known is left out of the results."""
    lost = []

    def lose_the_last(reply):
        masked = {"secure", "status"} == set(reply.content) and len(lost) < 1
        if masked and reply.metadata.message_type == "evaluate":
            lost.append(reply)
            return None
        return reply

    asked = ("federation.quorum=0.1", "federation.deadline_seconds=1", 'data.tasks=["laboratory"]')
    experiment = make_experiment(*SUMMED, *asked)
    events = run_in_process(at(experiment, tmp_path), lose_the_last)
    assert lost
    assert [event["stage"] for event in events if event["event"] == "evaluation_lost"] == [-1]
    assert read_results(tmp_path).average_accuracy is None  # without a start nothing is compared


@pytest.mark.parametrize(
    ("asked", "policy", "masked", "left"),
    [
        ("summed", "clear", True, True),
        ("summed", "summed", True, True),
        ("clear", "summed", False, False),
        ("summed", "clear", False, False),
        ("summed", "none", True, False),
    ],
)
def test_what_leaves_is_the_stricter_of_both(asked, policy, masked, left):
    assert counts_leave(asked, Policy(metrics=policy), masked) == left


def test_counts_of_sites_add_up_to_the_last_digit():
    layout = counts_layout((CORRECT, EXAMPLES), 2, 3, basis="")
    sites = [
        {CORRECT: [1, 10_000], EXAMPLES: [3, 99_999]},
        {CORRECT: [0, 0], EXAMPLES: [0, 1]},
        {CORRECT: [7, 1], EXAMPLES: [9, 3]},
    ]
    words = [layout.encode(counts, seeded_numpy("counts")).words for counts in sites]
    total = layout.decode(np.sum(words, axis=0, dtype=words[0].dtype))
    assert total[CORRECT].tolist() == [8, 10_001]
    assert total[EXAMPLES].tolist() == [12, 100_003]


@pytest.mark.parametrize("counts", [(11, 10), (-1, 10), (0, -1)])
def test_a_sum_that_no_counts_can_have_is_none(counts):
    """One site may add what it likes under its mask."""
    sums = {CORRECT: np.array([3, counts[0]]), EXAMPLES: np.array([4, counts[1]])}
    with pytest.raises(ProtocolError, match="counts that cannot be"):
        summed_rows(sums, (CORRECT, EXAMPLES), shares=False)
    good = {CORRECT: np.array([3, 10]), EXAMPLES: np.array([4, 10])}
    assert summed_rows(good, (CORRECT, EXAMPLES), shares=False) == [[3, 4], [10, 10]]


def test_who_sits_out_of_an_evaluation_has_answered(tmp_path, make_experiment):
    """Else one site that is away would stop a run in which all others keep their counts."""
    roster = Roster(("0", "1", "2"), dict, 0.0)
    clients = Clients(None, make_experiment(*SUMMED), roster, EventLog(tmp_path / "metrics.jsonl"))
    exchanges = SecureAggregation(clients, tmp_path, {"": {"0", "2"}})
    step, everyone = Step("end-stage", 0), dict.fromkeys("012", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureAggregation, "_advertise_keys", lambda self, step, wanted: None)
        with pytest.raises(BelowThreshold):  # the evaluation is lost, and the run goes on
            exchanges.share_keys(step, everyone, None, by_all=True)
        with pytest.raises(UserError, match="0 of 1 clients"):
            exchanges.share_keys(step, everyone, None)


@pytest.mark.slow
def test_no_loss_is_summed_under_a_mechanism(make_experiment, tmp_path):
    protected = ("privacy.mechanism=record", "privacy.target_epsilon=8")
    asked = (*SHORT, "federation.clients=3", "aggregation.rule=ffa", *protected)
    ran = rounds(make_experiment(*asked), tmp_path)
    assert ran.told("summed", "sites") == [3]
    assert ran.told("loss_summed", "loss") == []


@pytest.mark.parametrize(
    ("metrics", "masked", "left"),
    [
        ("", True, {"num_examples": 7.0, "loss": 1.5, "seconds": 2.0}),
        ("clear", False, {"num_examples": 1.0, "loss": 1.5}),
        ("clear", True, {"num_examples": 7.0, "loss": 1.5}),
        ("summed", True, {"num_examples": 7.0, "loss": 1.5}),
        ("summed", False, {"num_examples": 1.0}),
        ("none", True, {"num_examples": 7.0}),
        ("none", False, {"num_examples": 1.0}),
    ],
)
def test_figures_leave_as_the_policy_of_a_site_says(metrics, masked, left):
    """Under a mask the number of examples goes into the sum, and no more."""
    figures = {"num_examples": 7.0, "loss": 1.5, "seconds": 2.0}
    assert figures_allowed(figures, Policy(metrics=metrics) if metrics else None, masked) == left


def summed(losses, bits=32):
    """What the server decodes of a value and the losses."""
    count = len(losses)
    layout = Layout((SumField("x", (2,), 1.0, 1024.0), *loss_fields(bits, count)), bits, count)
    vectors = []
    for loss in losses:
        values = {"x": np.ones(2), **loss_values(loss)}
        vectors.append(layout.encode(values, seeded_numpy("loss")).words)
    return layout.decode(np.sum(vectors, axis=0, dtype=vectors[0].dtype))


def test_losses_beyond_the_bound_count_as_the_bound():
    assert mean_loss(summed([0.5, 1e9]), 2) == pytest.approx((0.5 + LARGEST_LOSS) / 2, abs=1e-4)


@pytest.mark.parametrize("kept", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("tellers", [1, 3])
def test_where_one_keeps_its_loss_nothing_can_be_read_of_the_others(kept, tellers):
    """The decoded field is as likely any word of the ring, whatever the others have added."""
    seen = [summed([0.5] * tellers + [kept]) for _ in range(400)]
    assert all(mean_loss(each, tellers + 1) is None for each in seen)
    assert len({int(each[LOSS_KEPT]) for each in seen}) > 390  # how many keep theirs is not told
    bound = max(float(abs(each[LOSS])) for each in seen)
    told = np.array([float(each[LOSS]) for each in seen]) / bound
    assert len(set(told)) > 390
    counts, _ = np.histogram(told, bins=8, range=(-1, 1))
    assert float(((counts - 50) ** 2 / 50).sum()) < 35  # chi-square, 7 degrees: 1 in 100,000
    assert without_loss(seen[0]).keys() == {"x"}  # no sum over a part of the sites


@pytest.mark.parametrize("forged", [-320.0, 320.0])
def test_a_mean_that_no_losses_can_have_is_not_told(forged):
    sums = summed([1.0, 2.0])
    assert mean_loss(sums, 2) == pytest.approx(1.5, abs=1e-4)
    assert mean_loss({**sums, LOSS: sums[LOSS] + forged}, 2) is None
    assert mean_loss({"x": np.zeros(2)}, 2) is None


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("evaluate", {CORRECT: [1], EXAMPLES: [2]}),
        ("train", {"loss": 1.0}),
        ("train", {"seconds": 1.0}),
        ("train", {"num_examples": 89.0}),
        ("train", {"num_examples": 89.0001}),
    ],
)
def test_figures_do_not_leave_beside_a_mask(kind, figures):
    """Whoever puts them into the reply: the last look at it keeps them."""
    told = RecordDict({"status": ConfigRecord({"code": "ok"}), "metrics": MetricRecord(figures)})
    asked = RecordDict({"secure": ConfigRecord({"request": b""})})
    with assume_identity(1, 1):
        request = Message(asked, 1, kind)
        with pytest.raises(PayloadError, match="in a secure sum alone"):
            check_reply(Message(told, reply_to=request), request)
        plain = Message(RecordDict({"x": ConfigRecord({})}), 1, kind)
        assert check_reply(Message(told, reply_to=plain), plain)
