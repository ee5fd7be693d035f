"""Nothing grows over the rounds of a run: memory and files of the server and of the clients'
processes, and what a round costs."""

import time

import numpy as np
import psutil
import pytest

from simulations.api import run
from tests.architectures import save
from tests.simulations.runs import write_tasks
from tests.sizes import TINY


def pace():
    """Seconds of computing that a fixed piece of work takes: a machine may slow down meanwhile."""
    begun, matrix = time.process_time(), np.ones((300, 300))
    for _ in range(20):
        matrix = matrix @ matrix / 300
    return time.process_time() - begun


def looked_at():
    """Megabytes, open files and seconds of computing, of this process and all that it started; and
    the machine's pace."""
    every = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in every]
    return (
        sum(process.memory_info().rss for process in every) / 1e6,
        sum(process.num_fds() for process in every),
        sum(each.user + each.system for each in times),
        pace(),
    )


def generative(folder):
    """A Llama of a few thousand weights, and rows in its words."""
    labels = {"laboratory": ("red", "blue"), "surgery": ("green", "options")}
    texts = ["a b", "c d c", "a a d", "b c", "d d a", "c a b"] * 2
    rows = {
        task: [{"text": text, "label": own[k % 2]} for k, text in enumerate(texts)]
        for task, own in labels.items()
    }
    model = f'model.name="{save(folder / "llama", "llama")}"'
    return "model.family=causal-lm", model, *write_tasks(folder / "data", rows)


ROUNDS = 300
PRIVATE = ("privacy.mechanism=record", "privacy.target_delta=1e-3")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:task")  # those of tests are small
@pytest.mark.parametrize(
    "settings",
    [lambda folder: TINY, lambda folder: (*TINY, *PRIVATE), generative],
    ids=["encoder", "private", "generative"],
)
def test_a_long_run_stays_as_it_is(tmp_path, make_experiment, settings):
    """A second task may cost its megabytes once: among 300 rounds they are no slope."""
    lengths = "federation.clients=4", f"federation.rounds={ROUNDS // 2}", "run.workers=2"
    seen = []

    def listen(event):
        if event["event"] == "round_finished":
            seen.append(looked_at())

    run(make_experiment(*settings(tmp_path), *lengths), out=tmp_path / "run", listener=listen)
    columns = "megabytes,files,seconds of computing,pace"
    np.savetxt(tmp_path / "rounds.csv", seen, "%.4f", ",", header=columns, comments="")
    assert len(seen) == ROUNDS
    half = np.array(seen[ROUNDS // 4 :])  # all pools and caches are warm
    memory, files, seconds, paces = half.T
    slope = np.polyfit(np.arange(len(half)), memory, 1)[0]
    spent = np.diff(seconds) - paces[1:]
    second = slice(-ROUNDS // 2, -ROUNDS // 3), slice(-ROUNDS // 6, None)  # both with a teacher
    early, late = (np.median(spent[part]) / np.median(paces[1:][part]) for part in second)
    print(f"{slope:.4f} MB a round, its work {early:.2f} and {late:.2f}, {files[-1]:.0f} files")
    assert slope < 0.1
    assert files[-1] <= files[0]
    assert late < 1.2 * early
