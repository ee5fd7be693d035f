"""Sites whose first task has labels, and class means; whose second is answered with texts; on real
processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from server.results import read_results
from tests.architectures import save
from tests.simulations.deployment.loopback import OPEN, SLOW, federation
from tests.simulations.deployment.short_experiment import alone, same_adapter
from tests.simulations.deployment.site_data import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("north", "south")
SUMS = OPEN + "share_sums = true\n"
"""Class means stand beside the words of the first task."""
TEXTS = ("a b", "c d", "a c", "b d", "a d", "b c", "a a", "d d")
EXPERIMENT = """\
[model]
family = "causal-lm"
name = {model}
max_new_tokens = 3
[data]
source = "sites"
tasks = ["colours", "words"]
generation = ["words"]
[data.labels]
colours = ["red", "green"]
[data.instructions]
words = "Answer with Text ."
[federation]
rounds = 2
deadline_seconds = {deadline}
[adapter]
rank = 4
[train]
learning_rate = 3e-2
batch_size = 4
precision = "float32"
[run]
threads = 1
"""


def divide(folder: Path) -> None:
    """Of one task a label, of the other a text of two words."""
    for task in ("colours", "words"):
        for split in ("train", "test"):
            whole = []
            for k, site in enumerate(SITES):
                answers = [
                    {"text": text, "target": "red blue"}
                    if task == "words"
                    else {"text": text, "label": "red" if "a" in text else "green"}
                    for text in TEXTS[k::2]
                ]
                write_rows(folder / site / task / f"{split}.jsonl", answers)
                whole += [{**row, "site": site} for row in answers]
            write_rows(folder / "all" / task / f"{split}.jsonl", whole)


def test_they_learn_what_one_process_learns_and_count_their_own_answers(tmp_path: Path) -> None:
    data, model = tmp_path / "data", save(tmp_path / "model", "llama")
    divide(data)
    path = tmp_path / "words.toml"
    path.write_text(EXPERIMENT.format(model=json.dumps(str(model)), deadline=SLOW * 200))
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site, path, policy=SUMS)
            fed.start_site(site)
        run = fed.submit(str(path))
        fed.wait_event(run, "run_finished", 400)
        results = read_results(fed.run(run))
        same_adapter(fed.run(run), alone(path, data, tmp_path / "alone", SITES))
        told = (fed.run(run) / "metrics.jsonl").read_text()
    assert not [text for text in (*TEXTS, "red blue") if text in told]
    assert results.measures == {"colours": "accuracy", "words": "rouge-l"}
    expected = read_results(tmp_path / "alone")
    np.testing.assert_allclose(results.accuracy_matrix, expected.accuracy_matrix, atol=1e-9)
    assert results.accuracy_matrix[1][1] > results.zero_shot["words"]
