"""The analytic head of deal: sums of the frozen model, whatever has been learnt; class means tell
tasks apart and names add to them; where sums cannot leave, it is off."""

from __future__ import annotations

import pytest

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.deal.class_means import PROTOTYPES
from deal_core.deal.interface import phases_of, statistics_of
from deal_core.methods import method_of, resolve_auto


def experiment(*overrides: str) -> Experiment:
    return parse_experiment(apply_overrides({}, overrides), "test")


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "aggregation.secure=true",
        "aggregation.robust=cosine-norm",
        "stream.schedule=per-client stream.consolidate_every=9",
        "stream.schedule=joint",
        "train.step=server",
        "privacy.mechanism=record",
    ],
)
def test_by_default_it_is_one_round_after_learning(setting):
    phases = phases_of(method_of(experiment("federation.clients=3", *setting.split())), 3)
    assert list(phases) == ["learn", PROTOTYPES]
    assert phases[PROTOTYPES].rounds == 1
    statistics = phases[PROTOTYPES].statistics
    assert statistics is not None
    assert (statistics.layers, statistics.names, statistics.once) == (4, True, True)
    assert [statistics.names_weight(logits) for logits in (True, False)] == [0.5, 1.0]
    assert (statistics.directions, statistics.noise_multiplier, statistics.exact) == (
        256,
        0.61,
        None,
    )


@pytest.mark.parametrize(
    "setting",
    [
        "federation.clients=2",
        "privacy.mechanism=record stream.schedule=per-client",
        "privacy.mechanism=record stream.schedule=joint",
        'model.family=causal-lm data.generation=["task"] stream.schedule=joint',
        "method.prototype.enabled=off",
    ],
)
def test_where_no_sums_can_leave_it_is_off(setting):
    config = experiment("federation.clients=3", *setting.split())
    assert resolve_auto(config).prototype.enabled == "off"
    assert statistics_of(method_of(config)) is None
