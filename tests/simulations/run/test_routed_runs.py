"""Runs in which each task keeps an adapter of its own, and a router chooses among them."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.lora.state import Component
from deal_core.models import adapter_shapes
from deal_core.training.text_overlap import rouge_l
from server.results import read_results
from server.run import load_checkpoint
from simulations.engines.inprocess import run_inprocess
from simulations.run.model_checks import check_components
from simulations.use.export import ExportRequest, export
from tests.simulations.run.test_generation_runs import CLASS_MEANS, experiment_of
from tests.simulations.runs import accuracy_of, at

__all__ = ["experiment_of"]
APART = ("method.retention.apart=true", *CLASS_MEANS)


@pytest.fixture(scope="module")
def finished(experiment_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    experiment = at(experiment_of("llama", *APART), folder)
    run_inprocess(experiment, lambda event: None)
    return experiment, folder


def test_what_a_task_taught_stays_as_it_was(finished):
    """With the task named nothing changes after its stage."""
    results = read_results(finished[1])
    assert results.accuracy_matrix[1][0] == results.accuracy_matrix[0][0]
    assert results.forgetting == 0.0


def test_a_prediction_is_that_of_the_evaluation(finished):
    experiment, folder = finished
    predictor, results = load_predictor(find_adapter(folder)), read_results(folder)
    texts = open_source(experiment.data).load("words").test
    told = [predictor.answer(each.text, "words").answer for each in texts]
    shares = [rouge_l(a, (e.target, *e.references)) for a, e in zip(told, texts, strict=True)]
    assert fmean(shares) == pytest.approx(results.accuracy_matrix[-1][0], abs=1e-9)
    assert accuracy_of(predictor, experiment, "colours") == results.accuracy_matrix[-1][1]
    # Both tasks have the same texts: the router takes each for one of them, and says which.
    untold = [predictor.answer(each.text) for each in texts]
    assert {each.task for each in untold} <= {"words", "colours"}
    answers = [each.answer if each.task == "words" else each.label for each in untold]
    shares = [rouge_l(a, (e.target, *e.references)) for a, e in zip(answers, texts, strict=True)]
    assert results.class_incremental is not None
    found = results.class_incremental.accuracy_matrix[-1][0]
    assert fmean(shares) == pytest.approx(found, abs=1e-9)


def test_a_checkpoint_keeps_components(finished):
    experiment, folder = finished
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = load_checkpoint(folder / "checkpoint.safetensors", shapes).state
    assert state.components == (Component(("words",), 4), Component(("colours",), 4))
    assert state.retained.rank == 8
    assert state.heads.keys() == {"words", "colours"}
    assert state.heads["words"].shape[0] == 1


def test_peft_answers_with_a_component_as_the_run_does(finished, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    experiment, folder = finished
    export(ExportRequest(str(folder), str(tmp_path / "out")))
    predictor = load_predictor(find_adapter(folder))
    predictor.answer("a b", "colours")  # its component is in the model
    base = AutoModelForCausalLM.from_pretrained(experiment.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "component-2"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        hidden = predictor.model.module.get_base_model().model  # ours reads rows of a forest
    delta = predictor.state.view(1).retained
    layer, factors = next(iter(delta.layers.items()))
    weight = dict(hidden.named_modules())[layer.removeprefix("model.")].base_layer.weight
    plain = AutoModelForCausalLM.from_pretrained(experiment.model.name, dtype=torch.float32)
    before = dict(plain.named_modules())[layer].weight
    assert torch.allclose(weight, before + factors.B @ factors.A, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(theirs, plain(input_ids=ids).logits)


@pytest.mark.parametrize(
    "overrides", [("method.name=lwf",), ("stream.schedule=joint", "data.generation=[]")]
)
def test_what_does_not_go_with_components_is_refused(experiment_of, overrides):
    with pytest.raises(UserError, match=r"retention\.apart"):
        check_components(experiment_of("llama", *APART, *overrides))
