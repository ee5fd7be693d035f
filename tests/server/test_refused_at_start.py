"""A run that is started without the command line's checks is refused all the same."""

from __future__ import annotations

import pytest

from deal_core.errors import UserError
from deal_core.protection import make_mechanism
from simulations.engines.inprocess import run_inprocess

pytestmark = pytest.mark.usefixtures("one_model")
UNPROTECTED = (
    "aggregation.secure=true",
    "privacy.mechanism=record",
    "privacy.noise_share=sum",
    "federation.clients=3",
)


def test_no_epsilon_of_a_noise_that_nobody_adds(make_experiment, tmp_path):
    """Where clients take the steps no one sum has the whole noise, of which each adds a share."""
    experiment = make_experiment(f'run.out="{tmp_path}"', *UNPROTECTED)
    with pytest.raises(UserError, match="only one sum has the whole noise"):
        run_inprocess(experiment, lambda event: None)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="only one sum"):
        make_mechanism(experiment)  # what clients call before they train


def test_a_run_that_is_there_is_not_overwritten(make_experiment, tmp_path):
    experiment = make_experiment(f'run.out="{tmp_path}"', "federation.rounds=1")
    run_inprocess(experiment, lambda event: None)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"already holds a run; continue it with run\.resume"):
        run_inprocess(experiment, lambda event: None)
    changed = {path.name for path, data in kept.items() if path.read_bytes() != data}
    assert changed <= {"metrics.jsonl"}  # the refusal is noted
