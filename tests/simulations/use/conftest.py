"""Two runs that several files export."""

from pathlib import Path

import pytest

from simulations.use.export import export
from tests.simulations.runs import simulated
from tests.sizes import TWO_LAYERS

LEARNING = (
    *("federation.rounds=1", "train.learning_rate=1e-2", "method.name=sequential"),
    *("train.precision=float32", "data.max_test=4"),
)


@pytest.fixture(scope="package")
def encoder(tmp_path_factory, make_experiment) -> Path:
    return simulated(make_experiment(*LEARNING, TWO_LAYERS), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="package")
def pooled(tmp_path_factory, make_experiment) -> Path:
    """A folder with the run of a map behind the pooling (``run``), and its export (``mine``)."""
    folder = tmp_path_factory.mktemp("pooled")
    settings = ("adapter.kind=pooled", "federation.rounds=1", "train.learning_rate=1")
    own = ("train.precision=float32", "data.max_test=4")
    run = simulated(make_experiment(*settings, *own), folder / "run")
    export(str(run), str(folder / "mine"))
    return folder
