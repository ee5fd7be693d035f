"""The floor that the filter is told, against updates that are noise and nothing else."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import orthogonal_init, spectrum, zero_adapter
from deal_core.lora.attach import read, write
from deal_core.methods.deal.retention import retain
from deal_core.methods.shared.plain import Plain
from deal_core.models import load_model
from deal_core.privacy.mechanisms.noise import SeededNoise
from deal_core.privacy.mechanisms.noise_floor import (
    denoising,
    entry_noise,
    round_variance,
    singular_floor,
)
from deal_core.privacy.mechanisms.private_gradients import PrivateGradients
from deal_core.randomness import seeded
from deal_core.training.loop import run_local_steps

B_ONLY = frozenset({"lora_B"})
CLIENTS, ROUNDS, STEPS = 3, 2, 5


@pytest.fixture(scope="module")
def noise_alone():
    """The mean update of clients without data, over rounds: the mechanism as it is, no signal."""
    model = load_model(ModelConfig(), AdapterConfig(), 32, torch.float32)
    shapes = read(model.module).shapes
    current = orthogonal_init(zero_adapter(shapes, 16), 8, 2.0, seeded("fresh"))
    for server_round in range(ROUNDS):
        moved = []
        for client in range(CLIENTS):
            write(model.module, current)
            source = PrivateGradients(
                record_ids=[],
                data=[],
                sample_rate=0.2,
                noise_multiplier=1.7,
                max_grad_norm=0.3,
                steps=STEPS,
                expected_batch=16,
                noise=SeededNoise(seeded("floor", server_round, client)),
            )
            run_local_steps(model, Plain(model, ["a"], []), source, B_ONLY, TrainConfig())
            moved.append(read(model.module))
        layers = {
            name: type(factors)(
                factors.A, torch.stack([m.layers[name].B for m in moved]).mean(dim=0)
            )
            for name, factors in current.layers.items()
        }
        current = type(current)(layers, current.scaling)
    return current


def variance() -> float:
    return ROUNDS * round_variance([entry_noise(STEPS, TrainConfig().learning_rate)] * CLIENTS)


def test_the_spread_of_an_entry_is_foretold(noise_alone):
    entries = torch.cat([f.B.flatten() for f in noise_alone.layers.values()])
    assert float(entries.std()) == pytest.approx(variance() ** 0.5, rel=0.03)


def test_the_singular_values_of_noise_are_foretold(noise_alone):
    floor = singular_floor(noise_alone, variance())
    values = torch.cat([spectrum(f).S[:8] for f in noise_alone.layers.values()])
    values *= noise_alone.scaling
    assert float(values.mean()) == pytest.approx(floor, rel=0.05)


def test_the_filter_that_is_told_takes_the_noise_away(noise_alone):
    """Without being told it keeps all of it: eight directions fit into the retained rank."""
    config = MethodConfig.model_validate({"retention": {"filter": "wiener"}})
    told = denoising(config, singular_floor(noise_alone, variance()))

    def left(retention) -> float:
        kept = retain(noise_alone, 16, retention)
        return sum(float((f.B @ f.A).norm() ** 2) for f in kept.layers.values())

    assert left(told.retention) < 0.02 * left(config.retention)


def test_a_floor_that_somebody_set_and_other_filters_stay():
    for retention in ({"filter": "wiener", "noise": 0.7}, {"filter": "identity"}):
        config = MethodConfig.model_validate({"retention": retention})
        assert denoising(config, 0.3) == config
    wiener = MethodConfig.model_validate({"retention": {"filter": "wiener"}})
    assert denoising(wiener, 0.0) == wiener
    assert denoising(wiener, 0.3).retention.noise == 0.3


def test_a_client_that_lies_about_its_noise_changes_next_to_nothing():
    honest = [0.01, 0.011, 0.012, 0.013, 0.014]
    for lie in (0.0, 1e6):
        told = round_variance([*honest, lie])
        assert 0.9 < told / round_variance(honest) * 6 / 5 < 1.1
    assert round_variance([]) == 0.0
