"""What an experiment leaves to itself: consolidation runs where names of labels answer alone, and
never where nobody has measured it; class means weigh as suits the family of the model."""

from __future__ import annotations

import pytest

from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.methods import method_of, phases_of, resolve_auto
from deal_core.methods.deal.consolidation import CONSOLIDATE

ALONE = "method.prototype.enabled=off"


def consolidation(*settings: str) -> str:
    experiment = parse_experiment(apply_overrides({}, settings), "test")
    data = resolve_auto(experiment).consolidation.data
    assert (CONSOLIDATE in phases_of(method_of(experiment))) == (data in {"private", "public"})
    return data


def test_what_is_cut_is_distilled_where_names_answer_alone():
    assert consolidation(ALONE) == "private"


def test_beside_class_means_it_is_not():
    assert consolidation() == "none"


@pytest.mark.parametrize(
    "setting",
    [
        "privacy.mechanism=record",
        "privacy.mechanism=client",
        "aggregation.robust=cosine-norm",
        "stream.schedule=per-client",
        "stream.schedule=joint",
        "model.family=causal-lm",
        "adapter.kind=core",
        "method.name=sequential",
        "method.retention.enabled=false",
        "method.retention.metric=names",
        "method.consolidation.data=none",
    ],
)
def test_where_something_stands_against_it_it_is_not(setting):
    assert consolidation(ALONE, setting) == "none"


def test_it_may_be_asked_for_beside_class_means():
    assert consolidation("method.consolidation.data=private") == "private"


@pytest.mark.parametrize(
    ("settings", "names", "ridge"),
    [
        ((), 0.5, 3.0),
        (("method.prototype.covariance=shared",), 0.5, 0.3),
        (("model.family=causal-lm",), 1.0, 3.0),
        (("model.family=causal-lm", "method.prototype.covariance=shared"), 1.0, 1.0),
        (("model.family=seq2seq-lm", "method.prototype.names=0"), 0.0, 3.0),
        (("method.prototype.ridge=2", "method.prototype.enabled=on"), 0.5, 2.0),
    ],
)
def test_class_means_weigh_as_suits_the_family_unless_told_otherwise(settings, names, ridge):
    experiment = parse_experiment(apply_overrides({}, ["federation.clients=3", *settings]), "test")
    prototype = resolve_auto(experiment).prototype
    assert (prototype.names, prototype.ridge, prototype.enabled) == (names, ridge, "on")
