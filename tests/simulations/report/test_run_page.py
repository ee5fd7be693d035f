"""The page of a run says what its files say: every figure is compared with ``results.json``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.folder import RunFolder, exclusive_lock
from server.results import read_results, rounded_up
from simulations.report.command import write_report
from simulations.report.run.log import read_log
from simulations.report.run.record import read_run
from simulations.report.run.spectrum import LayerSpectrum, singular_values
from tests.simulations.report.html_page import HtmlPage, read_json, resolve

EXAMPLES = Path(__file__).parent / "examples"
SIGNED = ("/backward_transfer", "/forward_transfer")
PERCENT = ("/accuracy_matrix/", "/zero_shot/", "/average_accuracy", "/forgetting")


@pytest.fixture(params=["plain", "private"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / request.param, tmp_path / "a-run"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLES / "plain", tmp_path / "a-run"))


def page(folder: Path) -> HtmlPage:
    return HtmlPage(write_report(folder).read_text(encoding="utf-8"))


def stopped(folder: Path, after: int, reason: str = "KeyboardInterrupt: ") -> Path:
    """Leave of a run what there is when it stops after so many rounds."""
    RunFolder(folder).results.unlink()
    path = RunFolder(folder).metrics
    kept, rounds = [], 0
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if rounds == after and event["event"] == "round_started":
            break
        rounds += event["event"] == "round_finished"
        kept.append(line)
    kept.append(json.dumps({"event": "run_stopped", "time": event["time"], "reason": reason}))
    path.write_text("\n".join(kept) + "\n")
    return folder


def test_every_figure_with_a_source_is_that_of_the_file_and_shown_rounded(run: Path) -> None:
    results = read_json(run / "results.json")
    found = [figure for figure in page(run).figures if figure.source]
    assert len(found) > 25
    for figure in found:
        value = resolve(results, figure.source)
        assert float(figure.value) == value, figure
        if figure.source.endswith(SIGNED):
            assert figure.text == f"{round(100 * value, 1) + 0.0:+.1f}"
        elif any(part in figure.source for part in PERCENT):
            assert figure.text == f"{100 * value:.1f}"
        elif "/epsilon/" in figure.source:
            assert figure.text == rounded_up(value, 4)


def expected(results: dict[str, Any]) -> Iterator[str]:
    """Pointers to all that must be on the page."""
    for i, row in enumerate(results["accuracy_matrix"]):
        for j in range(len(row)):
            yield f"/accuracy_matrix/{i}/{j}"
            yield f"/class_incremental/accuracy_matrix/{i}/{j}"
    for task in results["tasks"]:
        yield f"/zero_shot/{task}"
    for name in ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"):
        yield f"/{name}"
    yield "/class_incremental/average_accuracy"
    for client in results["per_client"]:
        yield f"/per_client/{client}/average_accuracy"
    for client in results["privacy"]["epsilon"]:
        yield f"/privacy/epsilon/{client}"
    for place in range(len(results["aggregation_error"])):
        yield f"/aggregation_error/{place}"
    for phase in results["seconds"]:
        yield f"/seconds/{phase}"
    yield "/peak_rss_bytes"


def test_nothing_that_was_measured_is_left_out(run: Path) -> None:
    sources = {figure.source for figure in page(run).figures}
    assert set(expected(read_json(run / "results.json"))) - sources == set()


def test_what_is_computed_for_the_page_is_right(plain: Path) -> None:
    results, shown = read_results(plain), page(plain)
    kept = shown.table("Accuracy in %, and points since")
    for j, task in enumerate(results.tasks):
        then, now = results.accuracy_matrix[j][j], results.accuracy_matrix[-1][j]
        own = [results.zero_shot[task], then, now]
        assert kept[j + 1][0] == f"{j + 1} {task}"
        assert kept[j + 1][1:4] == [f"{100 * value:.1f}" for value in own]
        assert float(kept[j + 1][4]) == pytest.approx(100 * (now - then), abs=0.06)
    averages = {k: own.average_accuracy or 0.0 for k, own in results.per_client.items()}
    worst = min(averages, key=lambda k: averages[k])
    assert f"worst client {worst}: {100 * averages[worst]:.1f} %" in shown.text
    assert f"mean over clients {100 * fmean(averages.values()):.1f} %" in shown.text
    up = sum(results.wire.bytes_up)
    assert any(float(f.value) == up for f in shown.figures if f.text.endswith("B"))


def test_clients_rounds_and_faults_are_those_of_the_log(plain: Path) -> None:
    """The third client answers with NaN in each of four rounds."""
    shown = page(plain)
    clients = shown.table("Each client; accuracies in %")
    columns = clients[0]
    used, left_out = columns.index("replies used"), columns.index("left out")
    assert [(row[0], row[used], row[left_out]) for row in clients[1:]] == [
        ("0", "4", "0"),
        ("1", "4", "0"),
        ("2", "0", "4"),
    ]
    assert "left out of a round 2 (4 ×)" in shown.text
    rounds = shown.table("Every round that has ended")
    assert [row[0] for row in rounds[1:]] == ["1", "2", "3", "4"]
    assert [row[1] for row in rounds[1:]] == ["1", "1", "2", "2"]
    assert {row[4] for row in rounds[1:]} == {"2 of 3"}
    assert shown.table("How often")[1] == ["reply not used", "2", "4"]
    listed = shown.table("Each, in order")
    assert [row[1] for row in listed[1:]] == ["1", "2", "3", "4"]
    assert all("not finite" in row[4] for row in listed[1:])


def test_what_is_needed_to_run_it_again_is_there(plain: Path) -> None:
    data = read_json(plain / "results.json")
    (plain / "results.json").write_text(json.dumps({**data, "commit": 40 * "a" + "-dirty"}))
    shown, results = page(plain), read_results(plain)
    for part in (
        "seed 0",
        "engine inprocess",
        f"commit {12 * 'a'} (dirty)",
        f"commit {40 * 'a'}-dirty",
        *(f"{name} {version}" for name, version in results.versions.items()),
    ):
        assert part in shown.text
    changed = dict(row[:2] for row in shown.table("Settings other than the defaults")[1:])
    assert changed["data.max_train"] == "16"
    assert changed["faults.kind"] == "not-finite"
    assert "run.out" not in shown.text
    every = dict(row[:2] for row in shown.table("All settings")[1:])
    assert every["aggregation.rule"] == "fedit"
    labels = shown.table("Labels of each task")
    assert [int(row[1]) for row in labels[1:]] == [len(v) for v in results.labels.values()]


def test_no_epsilon_without_what_it_means(tmp_path: Path) -> None:
    run = Path(shutil.copytree(EXAMPLES / "private", tmp_path / "a-run"))
    privacy, shown = read_results(run).privacy, page(run)
    statement = (
        f"at most epsilon = {rounded_up(max(privacy.epsilon.values()), 4)} at delta = "
        f"{rounded_up(privacy.delta, 3)} per record, composed over all rounds and tasks"
    )
    assert statement in shown.text
    assert f"Trust: {privacy.assumes}" in shown.text
    assert "Simulation only" in shown.text
    table = shown.table("Spending of each client")
    assert len(table) == 1 + len(privacy.epsilon)
    for row in table[1:]:
        assert row[2] == "8"  # the limit
        assert row[3:] == [rounded_up(privacy.delta, 3), "record", "all rounds and tasks"]
    assert "training examples" in shown.text  # but not how many: every client weighs 1
    assert {row[1] for row in shown.table("Each client; accuracies in %")[1:]} == {"–"}


def test_no_epsilon_and_no_delta_is_shown_smaller_than_it_is(tmp_path: Path) -> None:
    run = Path(shutil.copytree(EXAMPLES / "private", tmp_path / "a-run"))
    results = json.loads((run / "results.json").read_text())
    spent = {client: 7.99414 + 1e-4 * n for n, client in enumerate(results["privacy"]["epsilon"])}
    results["privacy"] |= {"epsilon": spent, "delta": 1.2341e-5}
    (run / "results.json").write_text(json.dumps(results))
    for row in page(run).table("Spending of each client")[1:]:
        assert spent[row[0]] <= float(row[1]) < spent[row[0]] + 1e-3
        assert float(row[3]) >= 1.2341e-5


def test_without_a_mechanism_the_page_says_that_no_epsilon_holds(plain: Path) -> None:
    assert "no epsilon holds" in page(plain).text


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_run_that_stopped_early_says_so_and_shows_what_is_known(plain: Path, rounds: int) -> None:
    evaluated = [
        json.loads(line)
        for line in RunFolder(stopped(plain, rounds)).metrics.read_text().splitlines()
        if '"evaluated"' in line
    ]
    shown = page(plain)
    assert "stopped early" in shown.text
    assert f"after {rounds} of 4 rounds: interrupted" in shown.text
    assert not any(figure.source for figure in shown.figures)  # no results to point into
    if evaluated:
        start = evaluated[0]["accuracy"]
        heat = shown.table("Accuracy in %, the task told")
        assert heat[1][0] == "nothing (zero-shot)"
        assert [cell.partition(",")[0] for cell in heat[1][1:]] == [
            f"{100 * value:.1f}" for value in start.values()
        ]
        assert len(heat) == 1 + len(evaluated)
    else:
        assert "Nothing has been evaluated" in shown.text


def test_a_run_that_is_at_work_is_not_called_stopped(plain: Path) -> None:
    stopped(plain, 1)
    with exclusive_lock(RunFolder(plain).writing):
        assert "The run is at work: 1 of 4 rounds have ended" in page(plain).text
    assert "stopped early" in page(plain).text


def test_a_killed_run_ended_without_a_word(plain: Path) -> None:
    stopped(plain, 2)
    path = RunFolder(plain).metrics
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert "after 2 of 4 rounds; its process ended without a word" in page(plain).text


def test_a_deployments_page_names_its_sites(plain: Path) -> None:
    path = RunFolder(plain).metrics
    names = ["north", "south", "<east>"]
    path.write_text(path.read_text().replace('"sites": []', f'"sites": {json.dumps(names)}'))
    text = (plain / "results.json").read_text()
    (plain / "results.json").write_text(
        text.replace('"engine": "inprocess"', '"engine": "deployment"')
    )
    shown = page(plain)
    assert shown.text.startswith("a-run – Deployment – deal")
    clients = shown.table("Each client; accuracies in %")
    assert [row[0] for row in clients[1:]] == names
    assert "left out of a round <east> (4 ×)" in shown.text


EVENT = {"time": 1.0, "stage": 0, "phase": "learn", "server_round": 1, "round": 1}
START = {
    **{"event": "run_started", "time": 0.0, "tasks": ["a"], "clients": 2, "done_rounds": 0},
    "stages": [{"rounds": 2, "tasks": ["a"]}],
}


def played(**more: object) -> list[dict[str, Any]]:
    where: dict[str, Any] = {**EVENT, **more}
    return [
        {**where, "event": "round_started", "clients": 2, "tasks": ["a"]},
        {**where, "event": "client_finished", "client": "0", "task": "a", "loss": 1.0},
        {**where, "event": "client_finished", "client": "1", "task": "a", "loss": 3.0},
        {**where, "event": "round_finished", "seconds": 2.0, "aggregation_error": 0.5},
    ]


def test_a_round_that_was_played_twice_counts_once() -> None:
    """Killed between the round and its checkpoint, then resumed."""
    log = read_log([START, *played(), START, *played(), *played(server_round=2, round=2)])
    assert [(one.number, one.answered, one.loss) for one in log.done] == [(1, 2, 2.0), (2, 2, 2.0)]
    assert [len(client.replies) for client in log.clients.values()] == [2, 2]
    assert len(log.starts) == 2


def fault(event: str, client: str, **more: object) -> dict[str, Any]:
    return {**EVENT, "event": event, "client": client, **more}


def test_what_went_wrong_in_a_round_that_was_played_twice_counts_once() -> None:
    """Also in an evaluation, and where the second playing went otherwise: the last one counts."""
    counting = {"stage": -1, "server_round": 0}
    first = [
        *played(excluded=["1"]),
        fault("client_failed", "0", reason="slow"),
        fault("client_idle", "1", code="busy"),
        fault("client_failed", "1", reason="slow", **counting),
    ]
    excluded = [START, *first, START, *first]
    log = read_log(excluded)
    zero, one = log.clients.values()
    assert (len(one.replies), len(one.excluded), one.left_out) == (1, 1, 2)
    assert (zero.left_out, list(one.idle.values())) == (1, ["busy"])
    assert [each.again for each in log.faults] == [True] * 3 + [False] * 3
    skipped = {**EVENT, "event": "round_skipped"}
    log = read_log([START, skipped, START, *played()])
    assert (log.passed, log.skipped) == (1, set())
    log = read_log([START, *first, START, skipped])
    assert log.passed == 1
    assert [client.left_out for client in log.clients.values()] == [0, 1]  # its evaluation stands
    assert not any(client.replies or client.idle for client in log.clients.values())


def test_a_page_after_a_resume_counts_every_step_once(plain: Path) -> None:
    """Every step killed before its checkpoint, and played again."""
    path = RunFolder(plain).metrics
    before, lines = page(plain), path.read_text().splitlines()
    start, *events = [json.loads(line) for line in lines]
    steps = groupby(events, lambda e: [e.get(key) for key in ("stage", "phase", "server_round")])
    twice = [start]
    for _, step in steps:
        own = list(step)
        twice += own if own[-1]["event"] == "run_finished" else [*own, start, *own]
    path.write_text("".join(json.dumps(event) + "\n" for event in twice))
    after = page(plain)
    for caption in ("Each client; accuracies", "Every round that has ended", "How often"):
        assert after.table(caption) == before.table(caption)
    listed = after.table("Each, in order")[1:]
    assert len(listed) == 8
    assert ["played again" in row[4] for row in listed] == [True, False] * 4


def test_logs_from_before_rounds_were_counted_over_the_run_can_be_read() -> None:
    stages = [{"rounds": 2, "tasks": ["a"]}, {"rounds": 1, "tasks": ["b"]}]
    events = [{**START, "stages": stages}, *played(), *played(server_round=2), *played(stage=1)]
    old = [{key: value for key, value in event.items() if key != "round"} for event in events]
    assert [one.number for one in read_log(old).done] == [1, 2, 3]


def test_the_spectrum_is_that_of_the_product() -> None:
    generator = np.random.default_rng(0)
    down, up = generator.normal(size=(3, 20)), generator.normal(size=(12, 3))
    found = singular_values(down, up)
    np.testing.assert_allclose(found, np.linalg.svd(up @ down, compute_uv=False)[:3], rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "halves", "nearly_all"),
    [((3.0, 4.0, 0.0), 1, 2), ((1.0, 1.0), 1, 2), ((0.0,), 0, 0)],
)
def test_directions_are_counted_by_squared_length(
    values: tuple[float, ...], halves: int, nearly_all: int
) -> None:
    layer = LayerSpectrum("a", tuple(sorted(values, reverse=True)))
    assert (layer.directions(0.5), layer.directions(0.99)) == (halves, nearly_all)


def test_the_adapter_file_is_drawn_layer_by_layer(plain: Path) -> None:
    generator = np.random.default_rng(0)
    folder = RunFolder(plain).adapter
    folder.mkdir()
    assert "There is no adapter file" in page(plain).text
    names = [f"base_model.model.layer.{number}" for number in (0, 1)]
    arrays = {}
    for name in names:
        arrays[f"{name}.lora_A.weight"] = generator.normal(size=(4, 16)).astype(np.float32)
        arrays[f"{name}.lora_B.weight"] = generator.normal(size=(8, 4)).astype(np.float32)
    save_file(arrays, folder / "adapter_model.safetensors")
    rows = page(plain).table("Spectrum of each layer")
    for name, row in zip(names, rows[1:], strict=True):
        update = arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
        largest = np.linalg.svd(update.astype(np.float64), compute_uv=False)[0]
        assert row[:3] == [
            name.removeprefix("base_model.model."),
            f"{np.linalg.norm(update):.3g}",
            f"{largest:.3g}",
        ]
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "There is no adapter file" in page(plain).text


def test_bounds_of_the_same_study_and_seed_stand_beside_the_run(tmp_path: Path) -> None:
    cells = tmp_path / "study" / "cells"
    run = Path(shutil.copytree(EXAMPLES / "plain", cells / "deal.seed0"))
    stored = Path(__file__).parents[3] / "research/results/medmcqa/study.json"
    study = read_json(stored)
    (tmp_path / "study" / "study.json").write_text(json.dumps(study))
    bounds = {
        cell["arm"]: cell["outcome"]["average_accuracy"]
        for cell in study["cells"]
        if cell["bound"] and cell["seed"] == 0
    }
    assert len(bounds) > 2
    rows = page(run).table("Average accuracy beside the bounds")
    shown = {row[0]: row[1] for row in rows[3:]}
    assert shown == {f"{arm} (bound)": f"{100 * value:.1f}" for arm, value in bounds.items()}
    arms = {arm: {"bound": arm} for arm in bounds if arm != "joint"}
    arms |= {"deal": {}}  # without a bound that was measured before it was taken out
    (tmp_path / "study" / "study.json").write_text(
        json.dumps({**study, "file": {"arms": arms, "seeds": [0, 1, 2, 3, 4]}})
    )
    rows = page(run).table("Average accuracy beside the bounds")
    assert {row[0] for row in rows[3:]} == {f"{arm} (bound)" for arm in bounds if arm != "joint"}
    (tmp_path / "study" / "study.json").write_text("damaged")
    assert "beside the bounds" not in page(run).text


def test_a_damaged_log_is_one_line(plain: Path) -> None:
    from deal_core.errors import UserError

    (plain / "metrics.jsonl").write_text('{"event": "evaluated", "time": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        read_run(plain)
