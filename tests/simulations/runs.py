"""What tests of whole runs ask for again and again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message
from safetensors.numpy import load_file

from client.app import make_app
from deal_core.config.experiment import Experiment
from deal_core.config.file import to_run_config
from deal_core.data import load_for_clients
from deal_core.inference.predictor import Predictor
from server.folder import Listener, RunEvent
from server.results import Results, read_results
from server.run import run
from simulations.engines.inprocess import (
    FIRST_CLIENT_NODE,
    InProcessGrid,
    Interceptor,
    run_inprocess,
)
from simulations.engines.worker_pool import assume_identity

IN_SUM = (
    "federation.clients=3",
    "federation.rounds=2",
    "adapter.kind=pooled",
    "adapter.rank=2",
    "aggregation.secure=true",
    "train.step=server",
    "train.learning_rate=1.0",
    "train.precision=float32",
    "method.distillation.weight=0.0",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "privacy.target_delta=1e-3",
)
"""Three sites, two rounds of a task: every record protected by noise in the masked sum."""


def at(experiment: Experiment, folder: Path, **run_keys: object) -> Experiment:
    """The experiment with its run in ``folder``; ``run_keys`` are other keys of ``[run]``."""
    changed = experiment.run.model_copy(update={"out": str(folder), **run_keys})
    return experiment.model_copy(update={"run": changed})


def simulated(
    experiment: Experiment, folder: Path, listen: Listener = lambda event: None, **run_keys: object
) -> Path:
    """The folder of the run, once it has ended."""
    run_inprocess(at(experiment, folder, **run_keys), listen)
    return folder


def stopped(experiment: Experiment, folder: Path, at_event: Callable[[RunEvent], bool]) -> None:
    """Run until the first event of a kind, where Ctrl-C ends it."""

    def listen(event: RunEvent) -> None:
        if at_event(event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulated(experiment, folder, listen)
    assert not (folder / "results.json").exists()


def write_tasks(folder: Path, tasks: Mapping[str, Any]) -> tuple[str, ...]:
    """Files with the rows of each task, by split or the same for both; what reads them."""
    for task, rows in tasks.items():
        (folder / task).mkdir(parents=True)
        for split in ("train", "test"):
            own = rows[split] if isinstance(rows, dict) else rows
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, own)))
    return "data.source=files", f'data.path="{folder}"', f"data.tasks={json.dumps([*tasks])}"


def public_texts(folder: Path) -> str:
    """Sixty of them, and the setting that reads them."""
    path = folder / "public.txt"
    path.write_text("".join(f"Sentence {n} is about {n % 7} things\n" for n in range(60)))
    return f'data.public_path="{path}"'


def run_in_process(
    experiment: Experiment, see: Interceptor = lambda reply: reply
) -> list[dict[str, Any]]:
    """The events of a run; ``see`` sees each reply on its way, and may change or lose it."""
    events: list[dict[str, Any]] = []
    grid = InProcessGrid(make_app(), to_run_config(experiment), experiment.federation.clients)
    grid.interceptor = see
    with assume_identity(1, 1):
        run(grid, experiment, events.append)
    return events


def no_number(reply: Message) -> Message:
    """The reply; of the first client's updates without a number in one factor."""
    if reply.metadata.src_node_id == FIRST_CLIENT_NODE and "lora" in reply.content:
        record = reply.content["lora"]
        key = next(iter(record))
        record[key] = Array(np.full_like(record[key].numpy(), np.nan))
    return reply


class LoseOneUpdate:
    """Loses the first masked update on its way; ``lost`` says whether there was one."""

    lost = False

    def __call__(self, reply: Message) -> Message | None:
        if self.lost or not {"secure", "metrics"} <= set(reply.content):
            return reply
        self.lost = True
        return None


def learnt_adapter(folder: Path) -> dict[str, np.ndarray]:
    """The factors that a run exported, and the heads of labels where it has some."""
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    heads = folder / "adapter" / "heads.safetensors"
    return {**factors, **(load_file(heads) if heads.exists() else {})}


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    """Equal to the bit."""
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def assert_same_run(one: Path, two: Path) -> None:
    """Figures and adapters of two runs are equal to the bit."""
    first, second = read_results(one), read_results(two)
    for name in ("accuracy_matrix", "zero_shot", "class_incremental", "per_client", "privacy"):
        assert getattr(first, name) == getattr(second, name), name
    assert same(learnt_adapter(one), learnt_adapter(two))


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a refusal, the last one of what the command has said."""
    code, out, err = result
    assert code == 2, err
    assert "Traceback" not in out + err
    *said, line = err.splitlines()
    assert line.startswith("error: ")
    assert not any("error" in other for other in said)
    return line


def gain(results: Results) -> float:
    """Average accuracy over what the base model knew before anything was learnt."""
    assert results.average_accuracy is not None
    return results.average_accuracy - fmean(results.zero_shot.values())


def accuracy_of(predictor: Predictor, experiment: Experiment, task: str) -> float:
    """Share of a task's test texts that are answered rightly."""
    examples = load_for_clients(experiment, task).test
    right = [predictor.answer(e.text, task).label == e.label for e in examples]
    return sum(right) / len(right)
