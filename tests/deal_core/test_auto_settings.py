"""What an experiment leaves to itself: class means weigh as suits the family of the model."""

from __future__ import annotations

import pytest

from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.methods import resolve_auto


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ((), 0.5),
        (("model.family=causal-lm",), 1.0),
        (("model.family=seq2seq-lm", "method.prototype.names=0"), 0.0),
        (("method.prototype.names=2", "method.prototype.enabled=on"), 2.0),
    ],
)
def test_class_means_weigh_as_suits_the_family_unless_told_otherwise(settings, names):
    experiment = parse_experiment(apply_overrides({}, ["federation.clients=3", *settings]), "test")
    prototype = resolve_auto(experiment).prototype
    assert (prototype.names, prototype.enabled) == (names, "on")
