"""``python -m tests.golden.make [RUN ...]`` writes ``golden.json``: what small whole runs compute.

A change that is to keep every number is checked against it (``test_golden``). Runs named on the
command line are made anew, the others stay; where none is named, all are.
"""

import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from deal_core.config.experiment import ModelConfig
from deal_core.privacy.ledger import Ledger
from simulations import api

FILE = Path(__file__).with_name("golden.json")
SMALL: dict[str, Any] = {
    "data.tasks": ["laboratory", "surgery"],
    "data.max_train": 24,
    "data.max_test": 12,
    "federation.clients": 3,
    "federation.rounds": 2,
    "train.batch_size": 4,
    "train.max_length": 32,
    "train.precision": "float32",
    "run.threads": 1,
    "run.workers": 1,
}
TWICE = {"data.max_train": 48, "data.max_test": 24}
"""Rows enough for class means of both tasks."""
EMBEDDED = {"data.public_path": ""}
"""The project's own public texts."""
WORDS = ["heart", "lung", "bone", "drug", "nerve", "blood", "virus", "child", "law"]
LLM = {
    "model.template": ModelConfig().template,
    "method.retention.apart": False,
    "data.generation": ["research-question"],
    "data.measures": {},
    "data.instructions": {
        "head-and-neck": "Which specialty is the question from? Answer with one of the options.",
        "research-question": "Write the research question that the abstract answers.",
    },
    "adapter.retained_rank": 24,
    "data.tasks": ["head-and-neck", "research-question"],
    "data.max_train": 12,
    "data.max_test": 6,
    "federation.rounds": 1,
    "federation.local_epochs": 1,
    "model.max_new_tokens": 6,
}
ORDERS = {"0": ["laboratory", "surgery"], "1": ["surgery", "laboratory"]}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("quickstart", {**TWICE, **EMBEDDED}),
    "lwf": ("quickstart", {"method.name": "lwf"}),
    "ewc": ("quickstart", {"method.name": "ewc"}),
    "olora": ("quickstart", {"method.name": "olora"}),
    "per-client": ("per-client", {"stream.orders": ORDERS}),
    "resumed": ("quickstart", TWICE),
    "int8": ("quickstart", {"wire.dtype": "int8"}),
    "record": ("quickstart", {"privacy.mechanism": "record", "federation.rounds": 1}),
    "private": ("private", {"method.prototype.enabled": "auto"}),
    "private-sums": ("private-sums", {"federation.rounds": 1}),
    "quickstart-llm": ("quickstart-llm", LLM),
}
DEPLOYED = "deployment"
"""Two sites and a server of their own processes on this machine."""
NAMES = (*RUNS, DEPLOYED)


def made(name: str, folder: Path) -> dict[str, Any]:
    """Play a run in an empty folder; what it computed, as :func:`told` tells it."""
    if name == DEPLOYED:
        return deployed(folder)
    experiment, changes = RUNS[name]
    public, out = folder / "public.txt", folder / "run"
    public.write_text("\n".join(map(" ".join, combinations(WORDS, 4))))
    settings = {**SMALL, "data.public_path": str(public), **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that so few records say little
        if name == "resumed":
            killed(experiment, settings, out)
        api.run(experiment, settings, out=out, resume=name == "resumed")
    return told(out, {site.name: site for site in (out / "sites").iterdir()})


def killed(experiment: str, settings: dict[str, Any], out: Path) -> None:
    """SIGKILL to a run in its second task, when a client has trained and the round is not over."""

    def die(event: dict[str, Any]) -> None:
        if event["event"] == "client_finished" and event["task"] == settings["data.tasks"][1]:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            api.run(experiment, settings, out=out, listener=die)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def deployed(folder: Path) -> dict[str, Any]:
    from tests.simulations.deployment.loopback import divide, experiment_file, federation

    sites = {"north": ".csv", "south": ".jsonl"}
    divide(folder / "data", sites)
    experiment = experiment_file(folder / "two-tasks.toml")
    with federation(folder) as fed:
        fed.join(sites, folder / "data", experiment)
        run = fed.submit(experiment)
        fed.wait_event(run, "run_finished", 500)
        return told(fed.run(run), {site: fed.site(site) / "state" for site in sites})


def told(run: Path, sites: dict[str, Path]) -> dict[str, Any]:
    """What is compared: accuracies (the first row of a matrix is zero-shot), bytes, privacy, the
    ledgers, and of each tensor its norm, its sum, and its projection on random numbers."""
    results = json.loads((run / "results.json").read_text())
    other, tasks = results["class_incremental"], results["tasks"]
    matrices = {"task-il": results, **({"class-il": other} if other else {})}
    clients = results["per_client"].values()
    return {
        "tests": [sum(c["test_examples"][n] or 0 for c in clients) for n in range(len(tasks))],
        **{
            kind: [[each["zero_shot"][task] for task in tasks], *each["accuracy_matrix"]]
            for kind, each in matrices.items()
        },
        "wire": results["wire"],
        "privacy": {key: results["privacy"][key] for key in ("epsilon", "delta", "n_delta")},
        "ledger": {name: list(events(site)) for name, site in sorted(sites.items())},
        "adapter": {
            key: figures(value)
            for file in sorted((run / "adapter").glob("*.safetensors"))
            for key, value in sorted(load_file(file).items())
        },
    }


def events(site: Path) -> Iterator[dict[str, Any]]:
    """A ledger's, without the name of the run, which is made of all settings there are."""
    for event in Ledger(site).events():
        yield {key: value for key, value in asdict(event).items() if key != "run"}


def figures(tensor: np.ndarray) -> list[float]:
    flat = tensor.astype(np.float64).ravel()
    direction = np.random.default_rng(flat.size).standard_normal(flat.size)
    return [float(np.linalg.norm(flat)), float(flat.sum()), float(flat @ direction)]


def leaves(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All numbers and words of nested tables and lists, each with its path."""
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(each, *path, str(key))


def differences(kept: dict[str, Any], now: dict[str, Any], same_machine: bool) -> list[str]:
    """One line a value that differs by more than rounding does. Adam makes much of the rounding of
    another machine: there norms and accuracies agree roughly, and all else exactly."""
    before, after = dict(leaves(kept)), dict(leaves(now))

    def allowed(path: tuple[str, ...]) -> float:
        if path[0] in ("task-il", "class-il"):
            return 1e-9 if same_machine else 0.25
        if path[0] == "adapter":
            norm = kept["adapter"][path[1]][0]
            return norm * (1e-5 if same_machine else 0.2 if path[2] == "0" else 1e9)
        return 1e-6 * abs(before[path])

    def equal(path: tuple[str, ...]) -> bool:
        one, two = before.get(path), after.get(path)
        if isinstance(one, float) and isinstance(two, float | int):
            return math.isclose(one, two, rel_tol=0, abs_tol=allowed(path))
        return path in before and path in after and one == two

    return [
        f"{'/'.join(path)}: {before.get(path, 'not there')} -> {after.get(path, 'not there')}"
        for path in {**before, **after}
        if not equal(path)
    ]


def machine() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{found and found[1]}, {kernels}, torch {torch.__version__.partition('+')[0]}"


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {"machine": machine(), "runs": {}}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    golden = {"machine": machine(), "runs": read()["runs"]}
    for name in names or NAMES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            golden["runs"][name] = made(name, Path(folder))
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        text = json.dumps(golden, indent=1)
        text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\s+", " ", m[0]), text)
        FILE.write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
