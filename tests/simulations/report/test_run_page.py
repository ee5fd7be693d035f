"""The page of a run says what its files say; measures of each label are those of counts by hand."""

import io
import json
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from rich.console import Console

from deal_core.config.experiment import RunConfig
from deal_core.errors import UserError
from server.folder import RunFolder, exclusive_lock
from server.results import read_results, rounded_up
from simulations.report.commands import write_report
from simulations.report.labels import FILE, LabelCounts, TaskCounts, count_labels
from simulations.report.record import read_run
from simulations.run.data_checks import expected_auc
from simulations.run.run_log import RunLog
from simulations.run.simulate import write_row_hashes
from simulations.run.summary import print_report
from tests.simulations.report.html_page import HtmlPage

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def plain(examples, tmp_path):
    return Path(shutil.copytree(examples / "plain", tmp_path / "a-run"))


@pytest.fixture
def private(examples, tmp_path):
    return Path(shutil.copytree(examples / "private", tmp_path / "a-run"))


def page(folder):
    return HtmlPage(write_report(folder).read_text(encoding="utf-8"))


def percent(share):
    return "–" if share is None else f"{100 * share:.1f}"


def stopped(folder, after):
    """Leave of a run what there is when it is interrupted after so many rounds."""
    RunFolder(folder).results.unlink()
    path = RunFolder(folder).metrics
    kept, rounds = [], 0
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if rounds == after and event["event"] == "round_started":
            break
        rounds += event["event"] == "round_finished"
        kept.append(line)
    end = {"event": "run_stopped", "time": event["time"], "reason": "KeyboardInterrupt: "}
    path.write_text("\n".join([*kept, json.dumps(end)]) + "\n")
    return folder


def test_accuracies_are_those_of_the_results_in_both_protocols(plain):
    results, shown = read_results(plain), page(plain)
    assert results.class_incremental is not None
    assert "no epsilon holds" in shown.text  # no mechanism protects it
    start = [results.zero_shot[task] for task in results.tasks]
    for caption, found in (("Task-IL", results), ("Class-IL", results.class_incremental)):
        _, *rows = shown.table(f"{caption} accuracy in %")
        told = [row[1:] for row in rows]
        assert told == [list(map(percent, row)) for row in (start, *found.accuracy_matrix)]
        assert f"{caption} accuracy {percent(found.average_accuracy)} %" in shown.text
    assert f"Forgetting {percent(results.forgetting)}" in shown.text
    kept = shown.table("Accuracy in %, and points since")
    for j, task in enumerate(results.tasks):
        then, now = results.accuracy_matrix[j][j], results.accuracy_matrix[-1][j]
        assert kept[j + 1][:4] == [f"{j + 1} {task}", *map(percent, (start[j], then, now))]
        assert float(kept[j + 1][4]) == pytest.approx(100 * (now - then), abs=0.06)


def test_clients_rounds_and_faults_are_those_of_the_log(plain):
    """The first client answers with NaN in each of four rounds."""
    results, shown = read_results(plain), page(plain)
    names, *clients = shown.table("Each client; accuracies in %")
    used, left_out = names.index("replies used"), names.index("left out")
    assert [(row[0], row[used], row[left_out]) for row in clients] == [
        ("0", "0", "4"),
        ("1", "4", "0"),
        ("2", "4", "0"),
    ]
    averages = [own.average_accuracy or 0.0 for own in results.per_client.values()]
    assert [row[names.index("accuracy")] for row in clients] == list(map(percent, averages))
    assert f"mean over clients {percent(fmean(averages))} %" in shown.text
    rounds = shown.table("Every round that has ended")
    assert [row[0] for row in rounds[1:]] == ["1", "2", "3", "4"]
    assert [row[1] for row in rounds[1:]] == ["1", "1", "2", "2"]
    assert {row[4] for row in rounds[1:]} == {"2 of 3"}
    errors = [error for error in results.aggregation_error if error is not None]
    assert min(errors) < 1e-6 < max(errors)  # of rounding, and of the rule
    assert [row[6] for row in rounds[1:]] == ["0" if e < 1e-6 else f"{e:.3g}" for e in errors]
    assert {row[8] for row in rounds[1:]} == {f"{results.wire.bytes_up[0] / 1e3:.1f} kB"}
    for row in shown.table("What went wrong")[1:]:
        assert row[:2] == ["reply not used", "0"]
        assert "not finite" in row[5]


def test_class_sums_tell_what_is_expected_of_them_and_who_is_against_them(plain):
    assert "membership" not in page(plain).text
    results = RunFolder(plain).results
    text = results.read_text().replace('"enabled": "off"', '"enabled": "on"')
    results.write_text(text.replace('"identity"', '"svd"'))
    where = {"time": 1795786390.0, "stage": 1}
    with RunFolder(plain).metrics.open("a") as log:
        for event in (
            {"event": "class_sums", "task": "laboratory", "records": [160, -2, 20], **where},
            {"event": "class_means_doubted", "tasks": ["laboratory"], "by": 2, "of": 3, **where},
            {"event": "class_means_rejected", "tasks": ["laboratory"], **where},
        ):
            log.write(json.dumps(event) + "\n")
    shown, screen = page(plain), io.StringIO()
    least, middle = (expected_auc(size, 256, 0.61) for size in (1, 20))
    line = f"{least:.2f} for the smallest label (1 records), {middle:.2f} for the median label"
    assert line in shown.text
    print_report(Console(file=screen, width=300), plain)
    assert line in screen.getvalue()
    doubted, rejected = shown.table("What went wrong")[-2:]
    assert doubted[5] == "2 of 3 clients answer worse with those of laboratory"
    assert (rejected[0], rejected[5]) == ("new class means left out", "laboratory")


def test_what_is_needed_to_run_it_again_is_there(plain):
    data = json.loads((plain / "results.json").read_text())
    (plain / "results.json").write_text(json.dumps({**data, "commit": 40 * "a" + "-dirty"}))
    shown, results = page(plain), read_results(plain)
    for part in (
        "seed 0",
        "engine inprocess",
        f"commit {40 * 'a'}-dirty",
        *(f"{name} {version}" for name, version in results.versions.items()),
    ):
        assert part in shown.text
    changed = dict(row[:2] for row in shown.table("Settings other than the defaults")[1:])
    assert changed["data.max_train"] == "16"
    assert "run.out" not in shown.text


def test_no_epsilon_without_what_it_means(private):
    privacy, shown = read_results(private).privacy, page(private)
    delta, times = (rounded_up(each, 3) for each in (privacy.delta, privacy.n_delta))
    for part in (
        f"epsilon <= {rounded_up(max(privacy.epsilon.values()), 3)} at delta = {delta} "
        f"(n delta <= {times}) per record, over all rounds and tasks",
        f"assumed honest {privacy.assumes}",
        f"Epsilon spent {rounded_up(max(privacy.epsilon.values()), 3)} of 8 at delta = {delta}",
        "Simulation only",
    ):
        assert part in shown.text
    table = shown.table("Spending of each client")
    assert len(table) == 1 + len(privacy.epsilon)
    for row in table[1:]:
        assert row[2:] == ["8", delta, "record", "all rounds and tasks"]
    found = json.loads((private / "results.json").read_text())
    spent = {client: 7.99414 + 1e-4 * n for n, client in enumerate(privacy.epsilon)}
    found["privacy"] |= {"epsilon": spent, "delta": 1.2341e-5}
    (private / "results.json").write_text(json.dumps(found))
    for row in page(private).table("Spending of each client")[1:]:  # never smaller than it is
        assert spent[row[0]] <= float(row[1]) < spent[row[0]] + 1e-3
        assert float(row[3]) >= 1.2341e-5
    # how many training examples there are is not known: every client weighs 1
    assert {row[1] for row in shown.table("Each client; accuracies in %")[1:]} == {"–"}
    so_far = page(stopped(private, 3))
    assert "delta = " in so_far.text
    assert len(so_far.table("Spending of each client")) == len(table)


@pytest.mark.parametrize("rounds", [0, 3])
def test_a_run_that_stopped_early_says_so_and_shows_what_is_known(plain, rounds):
    log = RunFolder(stopped(plain, rounds)).metrics.read_text().splitlines()
    evaluated = [json.loads(line) for line in log if '"evaluated"' in line]
    shown = page(plain)
    assert "stopped early" in shown.text
    assert f"after {rounds} of 4 rounds: interrupted" in shown.text
    if evaluated:
        heat = shown.table("Task-IL accuracy in %")
        assert heat[1][1:] == list(map(percent, evaluated[0]["accuracy"].values()))
        assert len(heat) == 1 + len(evaluated)
    else:
        assert "Nothing has been evaluated" in shown.text
    with exclusive_lock(RunFolder(plain).writing):
        assert f"The run is at work: {rounds} of 4 rounds have ended" in page(plain).text
    RunFolder(plain).metrics.write_text("\n".join(log[:-1]) + "\n")
    assert "its process ended without a word" in page(plain).text


def test_a_page_names_sites_and_values_of_a_column(plain):
    path = RunFolder(plain).metrics
    names = ["<east>", "north", "south"]
    path.write_text(path.read_text().replace('"sites": []', f'"sites": {json.dumps(names)}'))
    text = (plain / "results.json").read_text()
    (plain / "results.json").write_text(
        text.replace('"engine": "inprocess"', '"engine": "deployment"')
    )
    shown = page(plain)
    assert shown.text.startswith("a-run – Deployment – deal")
    assert [row[0] for row in shown.table("Each client; accuracies in %")[1:]] == names
    assert {row[1] for row in shown.table("What went wrong")[1:]} == {"<east>"}


EVENT = {"time": 1.0, "stage": 0, "phase": "learn", "server_round": 1, "round": 1}
FAILED = {**EVENT, "event": "client_failed", "reason": "slow"}
START = {
    **{"event": "run_started", "time": 0.0, "tasks": ["a"], "clients": 2, "done_rounds": 0},
    "stages": [{"rounds": 2, "tasks": ["a"]}],
}


def played(**more):
    where = {**EVENT, **more}
    return [
        {**where, "event": "round_started", "clients": 2, "tasks": ["a"]},
        {**where, "event": "client_finished", "client": "0", "task": "a", "loss": 1.0},
        {**where, "event": "client_finished", "client": "1", "task": "a", "loss": 3.0},
        {**where, "event": "round_finished", "seconds": 2.0, "aggregation_error": 0.5},
    ]


def test_a_round_that_was_played_twice_counts_once_as_it_went_last():
    """Killed between the round and its checkpoint, then resumed; an evaluation alike."""
    log = RunLog([START, *played(), START, *played(), *played(server_round=2, round=2)])
    assert [(one.number, one.used, one.loss) for one in log.done] == [(1, 2, 2.0), (2, 2, 2.0)]
    assert [sorted(replies) for replies in log.replies.values()] == [["0", "1"], ["0", "1"]]
    first = [
        *played(excluded=["1"]),
        {**FAILED, "client": "0"},
        {**EVENT, "event": "client_idle", "client": "1", "code": "busy"},
        {**FAILED, "client": "1", "stage": -1, "server_round": 0},
    ]
    log = RunLog([START, *first, START, *first])
    assert [(one.used, one.loss) for one in log.done] == [(0, 3.0)]
    assert [e["client"] for e in log.of("client_failed", "client_idle")] == ["0", "1", "1"]
    log = RunLog([START, *first, START, {**EVENT, "event": "round_skipped"}])
    assert log.passed == 1
    assert list(log.replies) == [(-1, "learn", 0)]  # its evaluation stands


def test_a_damaged_log_is_one_line(plain):
    (plain / "metrics.jsonl").write_text('{"event": "round_lost", "server_round": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        read_run(plain)


COUNTS = TaskCounts(
    labels=["cat", "dog", "bird"],
    counts=[[3, 1, 0], [2, 4, 0], [0, 0, 0]],
    calibration_error=0.0425,
    calibration="4.0 % before, 2.0 % after",
)


def test_precision_recall_and_f1_are_those_of_the_counts():
    """cat: 3 of 4 texts, 3 of 5 answers; dog: 4 of 6, 4 of 5; no bird, and none seen."""
    by_hand = [[3 / 5, 3 / 4, 2 / 3], [4 / 5, 4 / 6, 8 / 11], [np.nan, np.nan, 0.0]]
    np.testing.assert_allclose(COUNTS.scores(), by_hand)
    assert COUNTS.macro_f1 == pytest.approx((2 / 3 + 8 / 11) / 2)


def test_the_page_has_measures_and_confusions(plain):
    """Texts have their measures, and many labels no matrix."""
    names = [f"label {number}" for number in range(40)]
    counts = [[int(i == j) for j in range(40)] for i in range(40)]
    scores = {"exact-match": 0.125, "rouge-1": 0.5, "rouge-l": 0.375}
    many = TaskCounts(labels=names, counts=counts)
    found = LabelCounts(tasks={"surgery": COUNTS, "laboratory": many}, texts={"surgery": scores})
    (plain / FILE).write_text(found.model_dump_json())
    shown = page(plain)
    assert shown.table("Each label of surgery")[1:] == [
        ["cat", "4", "60.0", "75.0", "66.7"],
        ["dog", "6", "80.0", "66.7", "72.7"],
        ["bird", "0", "–", "–", "0.0"],
    ]
    error = "Calibration error of probabilities (ECE): 4.2 %"
    assert f"3 labels, macro F1 69.7. {error}" in shown.text
    assert "no temperature was sought: 4.0 % before, 2.0 % after." in shown.text
    assert shown.table("Texts written for surgery, in %")[1:] == [
        ["surgery", "37.5", "50.0", "12.5"]
    ]
    assert "40 labels, macro F1 100.0" in shown.text
    assert len(shown.table("Each label of laboratory")) == 41
    assert "laboratory: texts by true label" not in shown.text
    head, *rows = shown.table("surgery: texts by true label")
    assert head == ["true label", *COUNTS.labels]
    assert [row[0] for row in rows] == COUNTS.labels
    assert [list(map(int, row[1:])) for row in rows] == COUNTS.counts


def test_what_is_not_counted_is_said(plain):
    """Texts of a deployment stay where they are, and other rows than those of the run are others'.
    Without counts the page says how to get them."""
    results = RunFolder(plain).results
    text, config = results.read_text(), read_results(plain).config
    write_row_hashes(config.model_copy(update={"run": RunConfig(out=str(plain))}))
    record = RunFolder(plain).row_hashes
    record.write_text(record.read_text().replace(': "', ': "0', 1))
    with pytest.raises(UserError, match="--labels: the rows of task"):
        count_labels(plain, print)
    results.write_text(text.replace('"source": "medmcqa"', '"source": "sites"'))
    with pytest.raises(UserError, match="at its sites, and stay there"):
        count_labels(plain, print)
    assert not (plain / FILE).exists()
    assert "deal report RUN --labels" in page(plain).text
    (plain / FILE).write_text("damaged")
    assert "Not counted" in page(plain).text
