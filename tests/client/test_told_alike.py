"""A server that wants one site's update out of a single sum: it tells the others something from
which they learn nothing. Shown to work where a sum does not depend on what its sites were told."""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array
from safetensors.numpy import load_file

from client.gate import Asked, require
from deal_core.config.experiment import OWN_MEMORY, AdapterConfig, MethodConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.payload import LORA
from deal_core.methods import METHODS, make_method
from deal_core.models import adapter_shapes
from deal_core.protection import sum_terms
from deal_core.wire.instruction import Instruction
from server import summation
from server.strategy import start_state
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from tests.client.secure.sites import (
    OPEN,
    RUN,
    SiteGrid,
    asked_for,
    grid_of,
    make_sites,
    pins,
)
from tests.run_configs import placed
from tests.simulations.run.secure_runs import rounds

pytestmark = pytest.mark.usefixtures("one_model")

VICTIM = 0
OWN_ORDERS = "stream.schedule=per-client"
IDLE = "train.learning_rate=1e-9"
"""Whoever is told so learns next to nothing."""


class Zeros(SiteGrid):
    """Tells all sites but one that the model is zero: no factor of it has a gradient."""

    def tamper(self, exchange, number, request):
        if exchange != "mask" or number == VICTIM:
            return
        arrays = request.content[LORA]
        for key in arrays:
            arrays[key] = Array(np.zeros_like(arrays[key].numpy()))


class Idle(SiteGrid):
    """Tells all sites but one to learn nothing."""

    def _context(self, node):
        context = super()._context(node)
        if node != FIRST_CLIENT_NODE + VICTIM:
            lie = asked_for(IDLE)
            context.run_config = placed(lie, f"/srv/{RUN}")
        return context


LIARS = pytest.mark.parametrize("liar", [Zeros, Idle])


def own_update(site, grid):
    """What the site has learnt, as it lies on its own disk: change of each factor."""
    (file,) = site.state.glob("update-0-1.safetensors")
    sent = grid.asked["mask", VICTIM].content[LORA]
    return {key: value - sent[key].numpy() for key, value in load_file(file).items()}


@pytest.fixture
def found(monkeypatch):
    """The means that the server makes of sums."""
    seen, step = [], summation.mean_update

    def noted(rule, state, means):
        seen.append(means)
        return step(rule, state, means)

    monkeypatch.setattr(summation, "mean_update", noted)
    return seen


def noting(make, grids):
    """Makes a grid, and notes it."""

    def made(*given, **named):
        grids.append(make(*given, **named))
        return grids[-1]

    return made


@LIARS
def test_sites_that_are_told_otherwise_are_in_no_sum_with_the_one(tmp_path, liar):
    sites = make_sites(tmp_path)
    with pytest.raises(UserError, match="1 of 4 clients gave a valid reply"):
        rounds(asked_for(), tmp_path / RUN, grid_of=grid_of(sites, liar))
    assert not any(site.trained() for site in sites[1:])
    for site in sites[1:]:
        assert "another form than the round's terms say" in site.errors()[-1]


def test_where_a_sum_does_not_depend_on_it_the_update_of_the_one_is_read(
    tmp_path, monkeypatch, found
):
    """So the test above can fail, and the terms of a round are what stands in the way."""
    for module in ("client.requests", "server.summation"):
        monkeypatch.setattr(f"{module}.sum_terms", lambda *told: "")
    sites, grids = make_sites(tmp_path), []
    rounds(asked_for(), tmp_path / RUN, grid_of=noting(grid_of(sites, Zeros), grids))
    own = own_update(sites[VICTIM], grids[0])
    read = {key: len(sites) * mean.numpy() for key, mean in found[0].items()}
    for key, value in own.items():
        assert np.abs(value).max() > 1e-4
        np.testing.assert_allclose(read[key], value, atol=1e-6)


def told(experiment, state=None, **fields):
    """Terms of a first request, but for what is given."""
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = state or start_state(experiment, shapes)
    asked = {"task": "surgery", "stage": 0, "server_round": 1, "seen": ("laboratory",)}
    ranks = {"rank": state.current.rank, "retained_rank": state.retained.rank}
    request = Instruction.model_validate({**asked, **ranks, **fields})
    return sum_terms(experiment, experiment.model.name, request, state)


@pytest.mark.parametrize(
    "changed",
    [
        IDLE,
        "federation.local_epochs=9",
        "adapter.client_ranks=[4]",
        "aggregation.min_cohort=4",
        "method.distillation.weight=0",
        "model.max_new_tokens=3",
        "privacy.metrics=none",
        'data.instructions={surgery="Answer nothing."}',
        'data.measures={surgery="rouge-l"}',
    ],
)
def test_settings_are_among_the_terms(changed):
    assert told(asked_for()) != told(asked_for(changed))


COUNTS = {"task": "", "tasks": ("surgery",), "seen": ()}


@pytest.mark.parametrize(
    "fields",
    [
        {"stage": 1},
        {"server_round": 2},
        {"phase": "prototypes"},
        {"task": "laboratory", "seen": ()},
        {"seen": ()},
        {"future": ("skin",)},
        {"trained": ("lora_B",)},
        {"task": "", "tasks": ("surgery",)},
    ],
)
def test_the_request_is_among_the_terms(fields):
    assert told(asked_for()) != told(asked_for(), **fields)
    assert told(asked_for(), **COUNTS) != told(asked_for(), **COUNTS, learnt=("surgery",))


def test_what_is_of_one_client_is_not_among_the_terms():
    assert told(asked_for()) == told(asked_for(), past=("skin",))
    assert told(asked_for("run.threads=1")) == told(asked_for("run.threads=2"))
    own_orders = asked_for(OWN_ORDERS)
    assert told(own_orders) == told(own_orders, task="laboratory", seen=("surgery",))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (OWN_ORDERS, "work on different tasks"),
        ("stream.schedule=joint", "sums of several"),
        ("method.name=ewc", "what it keeps of earlier tasks"),
        ("method.name=deal-reference", "what it keeps of earlier tasks"),
        ("method.name=replay", "what it keeps of earlier tasks"),
    ],
)
def test_a_site_adds_nothing_that_no_other_could_compare(tmp_path, asked, line):
    experiment = asked_for(asked, "aggregation.rule=fedit")
    with pytest.raises(UserError, match=line):
        require(Asked(experiment), "sum")
    if asked == "method.name=ewc":
        sites = make_sites(tmp_path)
        with pytest.raises(UserError, match=r"all clients that train .* refuse"):
            rounds(experiment, tmp_path / RUN, grid_of=grid_of(sites))
        assert not any(site.trained() for site in sites)
        assert all(line in site.errors()[-1] for site in sites)
    require(Asked(asked_for(asked, "privacy.mechanism=record")), "sum")
    nominal = ("privacy.mechanism=record", "privacy.target_epsilon=1000")
    with pytest.raises(UserError, match=line):
        require(Asked(asked_for(asked, *nominal)), "sum")


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("part", ["current", "retained", "residual"])
def test_every_number_of_the_model_is_among_the_terms(part, factor):
    experiment = asked_for()
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = replace(start_state(experiment, shapes), residual=zero_adapter(shapes, 2))
    adapter = getattr(state, part)
    name, factors = next(iter(adapter.layers.items()))
    moved = getattr(factors, factor).clone()
    moved[-1, -1] = 1e-7
    layers = {**adapter.layers, name: replace(factors, **{factor: moved})}
    other = replace(state, **{part: replace(adapter, layers=layers)})
    assert told(experiment, state, residual_rank=2) != told(experiment, other, residual_rank=2)


def test_the_model_by_name_and_every_number_of_the_heads_are_among_the_terms():
    experiment = asked_for()
    state = start_state(experiment, adapter_shapes(experiment.model, experiment.adapter))
    headed = [replace(state, heads={"surgery": torch.full((2, 3), value)}) for value in (0.0, 1.0)]
    assert len({told(experiment, each) for each in (state, *headed)}) == 3
    request = Instruction(task="surgery", stage=0, server_round=1, rank=8, retained_rank=8)
    one, other = (sum_terms(experiment, name, request, state) for name in ("/a", "/b"))
    assert one != other


def test_an_evaluation_that_names_a_task_is_refused(tmp_path):
    """Else the labels that it counts among were not compared."""
    sites = make_sites(tmp_path, policy=OPEN.replace('"none"', '"summed"'))

    class Named(SiteGrid):
        def tamper(self, exchange, number, request):
            if request.metadata.message_type == "evaluate":
                request.content["instruction"]["task"] = "surgery"

    experiment = asked_for("privacy.metrics=summed")
    ran = rounds(experiment, tmp_path / RUN, grid_of=grid_of(sites, Named))
    assert ran.told("evaluation_lost", "reason")
    assert any("an evaluation is of no one task" in site.errors()[-1] for site in sites)


def test_counts_are_summed_where_every_site_has_some(tmp_path):
    """Whoever has no test records of a task would add zeros: the sum might be one site's."""
    policy = OPEN.replace('"none"', '"summed"')
    sites = make_sites(tmp_path, policy=policy)
    for site in sites[1:]:
        (site.folder / "data" / "surgery" / "test.jsonl").write_text("")
    experiment = asked_for("privacy.metrics=summed")
    ran = rounds(experiment, tmp_path / RUN, grid_of=grid_of(sites))
    assert ran.told("evaluation_lost", "reason")
    for site in sites[1:]:
        assert "fewer than 1 test records of a task" in site.errors()[-1]


def test_sites_weigh_the_same_in_a_sum_whatever_they_let_go(tmp_path, found):
    """Of the sum of few weights each can be worked out, and of one heavy site among light ones the
    sum is nearly the update."""
    sites, grids = make_sites(tmp_path, policy=OPEN + "share_num_examples = true\n"), []
    sites[0].write(pins(sites, sites[0]))
    grid = noting(grid_of(sites, SiteGrid), grids)
    rounds(asked_for("federation.rounds=1"), tmp_path / RUN, grid_of=grid)
    learnt = [own_update(site, grids[0]) for site in sites]
    for key, mean in found[-1].items():
        np.testing.assert_allclose(
            mean.numpy(), np.mean([u[key] for u in learnt], axis=0), atol=1e-6
        )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("train.learning_rate=1e10",), "less than or equal to 100"),
        (("train.learning_rate=4",), "more than a step of AdamW"),
    ],
)
def test_no_setting_makes_an_update_grow_with_the_number_of_records(tmp_path, settings, line):
    """Of steps there are as many: entries of the site with most would stand out, or overflow."""
    with pytest.raises(UserError, match=line):
        asked_for(*settings)


def test_methods_with_a_memory_of_their_own_are_known():
    """By what their files read of a task."""
    reads = {
        name: any(
            word in Path(inspect.getsourcefile(type(made))).read_text(encoding="utf-8")
            for word in ("task.past", "task.round_state")
        )
        for name in METHODS
        for made in [make_method(MethodConfig(name=name), AdapterConfig())]
    }
    assert {name for name, one in reads.items() if one} == OWN_MEMORY
