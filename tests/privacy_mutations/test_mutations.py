"""Each deliberate weakening of a mechanism is refuted by a check that the honest code passes."""

import inspect

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.lora.attach import read, write
from deal_core.models import load_model
from deal_core.privacy.dpsgd import UnsafeModel
from deal_core.privacy.policy import BudgetSpent, OutsidePlan
from tests.privacy_mutations.mutations import MUTATIONS

NOTICED = (AssertionError, UnsafeModel, BudgetSpent, OutsidePlan, pytest.fail.Exception)
"""A check that fails, or a guard of the code's own that stops the run."""
WEAKENINGS = [pytest.param(each, id=each.name) for each in MUTATIONS]
CHECKS = list(dict.fromkeys(mutation.noticed_by for mutation in MUTATIONS))


@pytest.fixture(scope="module")
def model(make_causal, random_adapter, tmp_path_factory):
    """A tiny model with something in both factors."""
    folder = make_causal(tmp_path_factory.mktemp("llama"), "llama")
    config = ModelConfig(family="causal-lm", name=str(folder))
    made = load_model(config, AdapterConfig(), 32, torch.float32)
    write(made.module, random_adapter(read(made.module).shapes, 8, 0.01, seed=5))
    return made


def run(check, model, folder):
    """A check, on the model as it was before, in a folder of its own."""
    before = read(model.module)
    try:
        if "folder" in inspect.signature(check).parameters:
            check(model, folder)
        else:
            check(model)
    finally:
        write(model.module, before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_code_as_it_is_passes(check, model, tmp_path):
    run(check, model, tmp_path)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mutation", WEAKENINGS)
def test_a_weakening_is_noticed(mutation, model, tmp_path, monkeypatch):
    mutation.apply(monkeypatch)
    with pytest.raises(NOTICED):
        run(mutation.noticed_by, model, tmp_path)
