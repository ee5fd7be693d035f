"""Makes the stored examples anew: two real runs of the settings that tests of runs share.

``python -m tests.simulations.report.make_examples``; after a change of what a run writes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from flwr.app import Array, Message

from server.folder import RunFolder
from server.results import Results, write_results
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from simulations.run.simulate import RECORD, record
from tests.conftest import experiment_with
from tests.simulations.runs import at, run_in_process
from tests.sizes import TWO_LAYERS

EXAMPLES = Path(__file__).parent / "examples"
PRIVATE = ("privacy.mechanism=record", "train.batch_size=4", TWO_LAYERS)
SETTINGS = {
    "plain": ("federation.clients=3",),
    "private": PRIVATE,
}
"""Name of an example to what its run sets."""


def third_is_no_number(reply: Message) -> Message:
    """The reply; the third client's updates without a number."""
    if reply.metadata.src_node_id == FIRST_CLIENT_NODE + 2 and "lora" in reply.content:
        record = reply.content["lora"]
        for key in record:
            record[key] = Array(np.full_like(record[key].numpy(), np.nan))
    return reply


def make_example(name: str) -> None:
    """Run it, and keep what a report reads, but for the adapter."""
    with TemporaryDirectory() as folder:
        experiment = at(experiment_with(*SETTINGS[name]), Path(folder))
        record(experiment)
        run_in_process(experiment, *([third_is_no_number] if name == "plain" else []))
        # where it ran, and from which commit, is of no use later
        kept = at(experiment, Path("runs") / name)
        text = RunFolder(Path(folder)).results.read_text(encoding="utf-8")
        (EXAMPLES / name).mkdir(parents=True, exist_ok=True)
        out = RunFolder(EXAMPLES / name)
        results = Results.model_validate_json(text.replace(folder, kept.run.out))
        write_results(out.results, results.model_copy(update={"commit": ""}))
        shutil.copy(RunFolder(Path(folder)).metrics, out.metrics)
        toml = (Path(folder) / RECORD).read_text(encoding="utf-8")
        (out.path / RECORD).write_text(toml.replace(folder, kept.run.out), encoding="utf-8")


if __name__ == "__main__":
    for example in SETTINGS:
        make_example(example)
