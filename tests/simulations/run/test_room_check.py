"""What a run would find in the middle of the stream is found before it starts."""

from __future__ import annotations

import pytest

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import method_of
from simulations.run import preflight as module
from simulations.run.experiment import Request, load_experiment


def asked(*overrides: str) -> Experiment:
    return load_experiment(Request("quickstart", overrides=overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=olora", "adapter.rank=100"),
        ("adapter.rank=100", "adapter.retained_rank=300"),
    ],
)
def test_directions_that_run_out_are_told_of_before_the_run(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="no room for 100 new directions: 300 of 384"):
        module.check_room(asked(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=olora", "adapter.rank=76"),
        ("adapter.rank=80", "adapter.retained_rank=300"),
        ("method.name=lwf", "adapter.rank=200"),
    ],
)
def test_what_fits_is_let_be(overrides: tuple[str, ...]) -> None:
    module.check_room(asked(*overrides))


def test_what_cannot_run_out_is_not_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = asked()
    monkeypatch.setattr(module, "method_of", lambda each: pytest.fail("laid out"))
    module.check_room(experiment)
    assert method_of(experiment) is not None
