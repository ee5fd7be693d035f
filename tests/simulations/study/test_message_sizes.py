"""Bytes of whole runs of the studies, to the byte; ``docs/scaling.md`` has them as a table."""

from __future__ import annotations

import json

import pytest
import torch

from deal_core.config.experiment import Experiment, FederationConfig
from deal_core.methods import method_of, statistics_of
from deal_core.randomness import seeded
from deal_core.wire.heads import pack_heads
from deal_core.wire.secure_layout import statistics_layout
from tests.simulations.study.message_sizes import Bytes, arm, message_sizes
from tests.stored_results import RESULTS

STREAMS = [
    "all-labels-medmcqa",
    pytest.param("all-labels-cl15-core", marks=pytest.mark.slow),
    pytest.param("all-labels-clinc10", marks=pytest.mark.slow),
]
INT8 = {
    "all-labels-medmcqa": {("up", "lora"): 2016000, ("down", "lora"): 2434656,
                           ("down", "distilled"): 576576},
    "all-labels-cl15-core": {("up", "lora"): 2822400, ("down", "lora"): 3402336,
                             ("down", "distilled"): 768768},
    "all-labels-clinc10": {("up", "lora"): 4032000, ("down", "lora"): 4853856,
                           ("down", "distilled"): 1057056},
}  # fmt: skip
"""Study to what a client of ``lwf-int8`` sends and is sent in the whole run, by record."""


def both_ways(sizes: Bytes) -> dict[str, int]:
    return {way: sum(n for (own, _), n in sizes.items() if own == way) for way in ("up", "down")}


@pytest.mark.slow
@pytest.mark.parametrize("study", STREAMS)
def test_lwf_in_int8_sends_what_the_page_says(study, tmp_path):
    assert message_sizes(arm(study, "lwf-int8", tmp_path)) == INT8[study]


@pytest.mark.parametrize("study", STREAMS)
def test_sizes_are_those_that_were_measured(study, tmp_path):
    """The runs of the studies, which trained real clients, in float32."""
    stored = json.loads((RESULTS / study / "study.json").read_text())
    cells = [cell["outcome"] for cell in stored["cells"] if cell["arm"] == "lwf"]
    measured = {(cell["bytes_up"], cell["bytes_down"]) for cell in cells}
    sizes = both_ways(message_sizes(arm(study, "lwf", tmp_path)))
    assert measured == {(sizes["up"], sizes["down"])}


@pytest.mark.parametrize(("dtype", "given"), [("float32", 1028), ("int8", 264)])
def test_what_one_more_label_weighs(dtype, given):
    """Once upwards, in a masked vector of words of 64 bits whatever the wire; downwards, of its
    head in public directions, with every evaluation."""
    experiment = Experiment(federation=FederationConfig(clients=3))
    statistics = statistics_of(method_of(experiment))
    size = statistics.size(experiment.model)

    def sizes(labels: int) -> tuple[int, int]:
        shapes = [statistics.shapes(labels, experiment.model)]
        layout = statistics_layout(experiment, shapes, "")
        head = torch.randn(labels, size + 1, generator=seeded("head"))
        down = pack_heads({"task": head}, statistics.rounds(dtype))
        return layout.length * layout.bits // 8, sum(array.nbytes for array in down.values())

    few, more = sizes(5), sizes(6)
    assert (more[0] - few[0], more[1] - few[1]) == (8 * 257, given)


def test_a_task_weighs_nothing_but_its_labels():
    """No covariance is sent."""
    experiment = Experiment(federation=FederationConfig(clients=3))
    statistics = statistics_of(method_of(experiment))
    assert statistics.shapes(15, experiment.model) == {"class_sums": (15, 257)}
