"""The adapter that a run leaves: its size, its base model, its tasks."""

import json

import pytest

from deal_core.config.experiment import Experiment, ModelConfig
from deal_core.config.file import parse_experiment
from deal_core.inference.folder import AdapterFolder
from deal_core.inference.predictor import read_adapter
from deal_core.lora.adapter import relative_difference, stack, zero_adapter
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from server.export import export_adapter, peft_config, task_spaces


def test_bytes_grow_until_the_retained_rank_is_full_and_no_further(tmp_path, random_adapter):
    """Of the default method on the embedded model, as a run exports it."""
    experiment, generator = Experiment(adapter={"retained_rank": 16}), seeded(0)
    method = make_method(experiment.method, experiment.adapter)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    nothing = zero_adapter(shapes, experiment.adapter.retained_rank)
    state = State(zero_adapter(shapes, experiment.adapter.rank), nothing)
    sizes, ranks = [], []
    for task in range(4):
        begun = method.begin_task(state, generator)
        learnt = random_adapter(shapes, begun.current.rank, begun.current.scaling, task)
        state = method.end_task(State(learnt, begun.retained))
        folder = tmp_path / str(task)
        export_adapter(folder, state, experiment, ())
        sizes.append((folder / "adapter_model.safetensors").stat().st_size)
        ranks.append(json.loads((folder / "adapter_config.json").read_text())["r"])
        whole, written = stack(state.parts()), read_adapter(AdapterFolder(folder))
        assert relative_difference(whole, written) < 1e-6
    assert ranks == [9, 17, 17, 17]  # 8 more a task, up to 16, and one of zeros
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] < 1e6


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("org/model", ("org/model", None)),
        ("org/model@v1.0", ("org/model", "v1.0")),
        ("embedded:minilm", ("sentence-transformers/all-MiniLM-L6-v2", None)),
        ("embedded:smollm2", ("embedded:smollm2", None)),  # 4-bit weights that no hub has so
    ],
)
def test_peft_is_told_the_revision_of_the_base_model(name, base, random_adapter):
    adapter = random_adapter({"query": (8, 8)}, 2, 1.0, 0)
    config = peft_config(adapter, Experiment(model=ModelConfig(name=name)))
    assert (config.base_model_name_or_path, config.revision) == base


def test_the_labels_of_text_generation_are_declared_and_no_data_are_asked_for():
    data = {
        "source": "sites",
        "labels": {"letters": [], "triage": ["Surgery", "Skin"]},
        "generation": ["letters"],
        "instructions": {"letters": "Answer the letter."},
    }
    experiment = parse_experiment({"data": data}, "test")
    spaces = {space.name: space for space in task_spaces(experiment, ("letters",))}
    assert spaces["letters"].labels == ()
    assert spaces["letters"].instruction == "Answer the letter."
    assert spaces["triage"].labels == ("Surgery", "Skin")
    assert (spaces["letters"].learnt, spaces["triage"].learnt) == (True, False)
