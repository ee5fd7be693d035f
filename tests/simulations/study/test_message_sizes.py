"""Bytes of whole runs of the studies, to the byte; ``docs/scaling.md`` has them as a table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from deal_core.config.experiment import Experiment
from deal_core.methods import EmbeddedTask, method_of, statistics_of
from deal_core.models import embedding_size
from deal_core.randomness import seeded
from deal_core.wire.heads import pack_heads
from deal_core.wire.sums import pack_sums
from tests.simulations.study.message_sizes import Bytes, arm, message_sizes

STREAMS = [
    "all-labels-medmcqa",
    pytest.param("all-labels-cl15-core", marks=pytest.mark.slow),
    pytest.param("all-labels-clinc10", marks=pytest.mark.slow),
]
INT8 = {
    "all-labels-medmcqa": {
        "lwf-int8": {("up", "lora"): 2016000, ("down", "lora"): 2434656,
                     ("down", "distilled"): 576576},
        "deal-bytes": {("up", "lora"): 1084800, ("up", "sums"): 1521168,
                       ("down", "lora"): 1254816, ("down", "distilled"): 493152,
                       ("down", "heads"): 89568},
    },
    "all-labels-cl15-core": {
        "lwf-int8": {("up", "lora"): 2822400, ("down", "lora"): 3402336,
                     ("down", "distilled"): 768768},
        "deal-bytes": {("up", "lora"): 1518720, ("up", "sums"): 2142672,
                       ("down", "lora"): 1750560, ("down", "distilled"): 728928,
                       ("down", "heads"): 232688},
    },
    "all-labels-clinc10": {
        "lwf-int8": {("up", "lora"): 4032000, ("down", "lora"): 4853856,
                     ("down", "distilled"): 1057056},
        "deal-bytes": {("up", "lora"): 1238400, ("up", "sums"): 3130800,
                       ("down", "lora"): 1562976, ("down", "distilled"): 914976,
                       ("down", "heads"): 1301520},
    },
}  # fmt: skip
"""Study and arm to what a client sends and is sent in the whole run, by record."""
RESULTS = Path("simulations/results")


def both_ways(sizes: Bytes) -> dict[str, int]:
    return {way: sum(n for (own, _), n in sizes.items() if own == way) for way in ("up", "down")}


@pytest.mark.slow
@pytest.mark.parametrize("study", STREAMS)
def test_deal_at_the_bytes_of_lwf_in_int8_needs_fewer_in_all_and_more_upwards(study, tmp_path):
    found = {name: message_sizes(arm(study, name, tmp_path / name)) for name in INT8[study]}
    assert found == INT8[study]
    deal, lwf = (both_ways(found[name]) for name in ("deal-bytes", "lwf-int8"))
    assert sum(deal.values()) < sum(lwf.values())
    assert deal["up"] > lwf["up"]
    assert deal["down"] < lwf["down"]


@pytest.mark.slow
@pytest.mark.parametrize("study", STREAMS)
def test_it_needs_fewer_at_sites_too_where_lwf_saves_more(study, tmp_path):
    """Evaluations ride along with training requests there."""
    deal, lwf = (
        message_sizes(arm(study, name, tmp_path / name), sites=True)
        for name in ("deal-bytes", "lwf-int8")
    )
    assert deal.total() < lwf.total() < 0.93 * sum(INT8[study]["lwf-int8"].values())


@pytest.mark.parametrize("study", STREAMS)
@pytest.mark.parametrize(
    ("name", "first_seed"), [("lwf", 0), pytest.param("deal", 3, marks=pytest.mark.slow)]
)
def test_sizes_are_those_that_were_measured(study, name, first_seed, tmp_path):
    """The runs of the studies, which trained real clients, in float32. Of deal those of seeds 0 to
    2 are older: their requests for sums carried the adapter."""
    stored = json.loads((RESULTS / study / "study.json").read_text())
    found = [c for c in stored["cells"] if c["arm"] == name and c["seed"] >= first_seed]
    cells = [cell["outcome"] for cell in found]
    measured = {(cell["bytes_up"], cell["bytes_down"]) for cell in cells}
    sizes = both_ways(message_sizes(arm(study, name, tmp_path)))
    assert measured == {(sizes["up"], sizes["down"])}


@pytest.mark.parametrize(("dtype", "sent", "given"), [("float32", 3076, 6152), ("int8", 776, 1552)])
def test_what_one_more_label_weighs(dtype, sent, given):
    """Once upwards, with the sums of its task; downwards with every evaluation."""
    experiment = Experiment()
    statistics = statistics_of(method_of(experiment))
    size, form = embedding_size(experiment.model, statistics.layers), statistics.at(dtype)

    def sizes(labels: int) -> tuple[int, int]:
        x = normalize(torch.randn(60, size, generator=seeded("bytes")), dim=1)
        sums = statistics.collect(EmbeddedTask(x, torch.arange(60) % labels, labels))
        head = torch.randn(statistics.head_shape(labels, size), generator=seeded("head"))
        up = pack_sums([form.pack(sums)], form.codes)
        down = pack_heads({"task": head}, statistics.rounds(dtype))
        return tuple(sum(array.nbytes for array in packed.values()) for packed in (up, down))

    few, more = sizes(5), sizes(6)
    assert (more[0] - few[0], more[1] - few[1]) == (sent, given)


def test_the_server_keeps_sums_of_a_task_whatever_its_clients():
    """Float64: of each label its count and sum, of the task one triangle of a Gram matrix."""
    statistics = statistics_of(method_of(Experiment()))
    size = embedding_size(Experiment().model, statistics.layers)
    shapes = statistics.shapes(15, size)
    assert {name: 8 * math.prod(shape) for name, shape in shapes.items()} == {
        "count": 15 * 8,
        "sum": 15 * 6144,
        "gram": 2362368,
    }
