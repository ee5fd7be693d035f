"""Architectures, aggregation rules and privacy mechanisms, crossed: whole runs in small."""

from itertools import product

import numpy as np
import pytest
import torch
from peft import PeftModel

from deal_core.aggregation.rules import AGGREGATION_RULES
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.lora.adapter import stack
from deal_core.models import adapter_shapes
from deal_core.protection import MECHANISMS
from server.results import read_results
from server.run import load_checkpoint
from simulations.use.export import export
from tests.architectures import CONFIGS, LOADERS, WORKING, save
from tests.simulations.runs import learnt_adapter, simulated
from tests.slow import slow_but

PRIVATE = {"none": (), "record": ("train.batch_size=4",)}
OWN_LAYERS = {"distilbert": ('adapter.target_modules=["out_lin"]',)}
CASES = [*product(WORKING, AGGREGATION_RULES, MECHANISMS)]
FEW = ("distilbert", "fedit", "none"), ("qwen3", "ffa", "record"), ("gpt2", "fedex", "none")
"""Of them here; all of them when slow tests run."""
THEIRS = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
"""PEFT tells that it corrects this for a GPT-2."""


@THEIRS
@pytest.mark.parametrize("case", slow_but(CASES, *FEW))
def test_a_run_of_two_tasks(make_experiment, tmp_path, case):
    """Every task is measured, what is private is charged, the run answers a text, and plain PEFT
    makes the same model of what is exported."""
    name, rule, mechanism = case
    folder = save(tmp_path / "model", name)
    experiment = make_experiment(
        f"model.family={CONFIGS[name][0]}",
        f'model.name="{folder}"',
        *OWN_LAYERS.get(name, ()),
        "adapter.rank=4",
        "adapter.retained_rank=8",
        "federation.rounds=1",
        "data.max_train=8",
        "data.max_test=6",
        f"aggregation.rule={rule}",
        f"privacy.mechanism={mechanism}",
        *PRIVATE[mechanism],
    )
    simulated(experiment, tmp_path / "run")
    results = read_results(tmp_path / "run")
    assert np.array(results.accuracy_matrix).shape == (2, 2)
    spent = results.privacy.epsilon.values()
    assert bool(spent) == (mechanism != "none")
    assert all(0 < epsilon <= experiment.privacy.target_epsilon for epsilon in spent)
    exported = learnt_adapter(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in exported.values())
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors", shapes).state
    whole = stack(state.parts())
    answer = load_predictor(find_adapter(tmp_path / "run")).answer("a b", results.tasks[0])
    assert answer.label in results.labels[results.tasks[0]]
    export(str(tmp_path / "run"), str(tmp_path / "mine"))
    base = LOADERS[experiment.model.family].from_pretrained(folder)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "mine"))
    for layer, factors in whole.layers.items():
        delta = plain.base_model.model.get_submodule(layer).get_delta_weight("default")
        expected = factors.B @ factors.A
        torch.testing.assert_close(
            delta, expected if delta.shape == expected.shape else expected.T, rtol=0, atol=1e-5
        )
        assert delta.abs().max() > 0
