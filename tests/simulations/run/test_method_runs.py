"""The switches of the method in whole runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.numpy import load_file

from simulations.engines.inprocess import run_inprocess
from tests.sizes import TWO_LAYERS

pytestmark = [pytest.mark.usefixtures("one_model"), pytest.mark.slow]


@pytest.fixture
def run_with(make_experiment, tmp_path):
    def run(name, *overrides):
        folder = tmp_path / name
        run_inprocess(make_experiment(f'run.out="{folder}"', *overrides), lambda event: None)
        return folder

    return run


def model_update(folder) -> torch.Tensor:
    """``dW`` of every layer, in one vector."""
    arrays = load_file(folder / "adapter" / "adapter_model.safetensors")
    keys = sorted(key for key in arrays if "lora_A" in key)
    pairs = [(arrays[key.replace("lora_A", "lora_B")], arrays[key]) for key in keys]
    return torch.cat([torch.from_numpy(B @ A).flatten() for B, A in pairs])


TWO = 'data.tasks=["laboratory", "surgery"]'
SWITCHES = [
    ("method.update.lambda1=1.0",),
    ("method.distillation.weight=0.0",),
    ("method.distillation.future_weight=0.0",),
    ("method.retention.filter=none",),
]
"""Each changes what clients learn, or what the server keeps of it."""


def test_every_switch_reaches_the_run(run_with):
    """A switch that a run drops on its way leaves the very same model."""
    short = (TWO, "data.max_train=16", "data.max_test=4")
    short += ("federation.rounds=1", "federation.local_epochs=2", "train.max_length=8", TWO_LAYERS)
    found = {(): model_update(run_with("none", *short))}
    for number, switch in enumerate(SWITCHES):
        found[switch] = model_update(run_with(f"switch{number}", *short, *switch))
    for switch, update in found.items():
        for other, its in found.items():
            assert switch == other or not torch.equal(update, its), (switch, other)


OFF = "method.retention.filter=none"


def test_without_retention_and_distillation_deal_is_sequential(run_with):
    """Up to rounding: what clients see of the task's start is put in and taken off again."""
    plain = run_with("plain", "method.name=sequential")
    off = run_with(
        "off", OFF, "method.distillation.weight=0.0", "method.distillation.future_weight=0.0"
    )
    expected, found = model_update(plain), model_update(off)
    assert (found - expected).norm() < 0.01 * expected.norm()
