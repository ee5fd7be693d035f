"""Whole runs in which the server takes the steps on one factor, of every family: against weights
that learn by themselves in torch's own backward pass, and in PEFT."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.lora.adapter import Adapter, LoraFactors, stack
from deal_core.lora.attach import lora_layers
from deal_core.methods import method_of
from deal_core.models import load_model
from deal_core.randomness import seeded
from server.results import read_results
from server.strategy import start_state
from tests.architectures import CONFIGS, LOADERS, save
from tests.simulations.runs import at, learnt_adapter, run_in_process, write_tasks
from tests.slow import slow_but

NAMES = ("llama", "gpt2", "t5", "bert")
RANK, SCALING, BOUND, RATE = 2, 2.0, 0.1, 6.0
"""Of an adapter, both, of a gradient, of a step."""
ROUNDS = 2
TEXTS = ("a b", "c d d", "a c", "b d", "a d c b", "b c", "a a", "d d")
LABELS = {"colours": ("blue", "green", "red"), "letters": ("c", "d")}
THEIRS = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
"""PEFT tells that it corrects this for a GPT-2."""


@dataclass(frozen=True)
class Ran:
    """A run of one architecture that has ended: its folder, its base model's, its experiment."""

    name: str
    folder: Path
    base: Path
    experiment: Experiment
    events: list[dict[str, Any]]

    def plain_peft(self):
        family = self.experiment.model.family
        base = LOADERS[family].from_pretrained(self.base)
        return PeftModel.from_pretrained(base, str(self.folder / "adapter")).eval()

    def predictor(self):
        return load_predictor(find_adapter(self.folder))


def played(make_experiment, name, folder, *overrides):
    base = save(folder / "model", name)
    rows = {
        task: [{"text": t, "label": labels[n % len(labels)]} for n, t in enumerate(TEXTS)]
        for task, labels in LABELS.items()
    }
    experiment = make_experiment(
        f"model.family={CONFIGS[name][0]}",
        f'model.name="{base}"',
        *write_tasks(folder / "data", rows),
        'data.instructions={letters="Answer with Text ."}',
        'data.partition.kind="iid"',
        "federation.clients=3",
        f"federation.rounds={ROUNDS}",
        f"adapter.rank={RANK}",
        f"adapter.lora_alpha={RANK * SCALING}",
        f"adapter.retained_rank={len(LABELS) * RANK}",
        "aggregation.rule=ffa",
        "aggregation.secure=true",
        "train.step=server",
        "train.precision=float32",
        f"train.learning_rate={RATE}",
        f"privacy.max_grad_norm={BOUND}",
        "method.distillation.weight=0.0",
        *overrides,
    )
    events = run_in_process(at(experiment, folder / "run"))
    return Ran(name, folder / "run", base, experiment, events)


@pytest.fixture(scope="module", params=slow_but(NAMES, "llama"))
def ran(request, make_experiment, tmp_path_factory):
    return played(make_experiment, request.param, tmp_path_factory.mktemp(request.param))


class Plain:
    """The same model, whose adapted layers are plain again and whose whole weights learn."""

    def __init__(self, experiment):
        self.model = load_model(experiment.model, experiment.adapter, experiment.train.max_length)
        self.layers = lora_layers(self.model.module)
        for layer in self.layers.values():
            layer.forward = layer.base_layer.forward
            layer.base_layer.weight.requires_grad_(True)

    def move(self, name, learnt):
        """Names of labels are still embedded by the weights as they were loaded."""
        layer = self.layers[name]
        change = (learnt.T if layer.fan_in_fan_out else learnt).float()
        moved = layer.weights.pretrained + change
        layer.weights.task_start = layer.weights.current = moved
        layer.base_layer.weight.data = moved

    def gradients(self, item, labels):
        self.model.module.zero_grad()
        self.model.forward_train([item], labels, ()).example_losses.sum().backward()
        found = {}
        for name, layer in self.layers.items():
            gradient = layer.base_layer.weight.grad.double()
            found[name] = gradient.T if layer.fan_in_fan_out else gradient
        return found


def expected_changes(experiment):
    """Layer name to what all of the run adds to its weight: every text of all clients in one sum,
    without masks and clients."""
    plain, source, method = Plain(experiment), open_source(experiment.data), method_of(experiment)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in plain.layers.items()}
    state = start_state(experiment, shapes)
    for stage, (task, labels) in enumerate(LABELS.items()):
        state = method.begin_task(state, seeded(experiment.run.seed, "begin", stage))
        before = {name: update_of(state, name) for name in shapes}
        fixed = {name: factors.A.double() for name, factors in state.current.layers.items()}
        learnt = {name: torch.zeros(shapes[name][0], RANK).double() for name in shapes}
        words = experiment.data.instructions.get(task, "")
        data = plain.model.encode(source.load(task).train, labels, words)
        for _ in range(ROUNDS):
            sums = {name: torch.zeros_like(learnt[name]) for name in shapes}
            for item in data:
                whole = plain.gradients(item, labels)
                own = {name: SCALING * whole[name] @ fixed[name].T for name in shapes}
                norm = float(torch.cat([each.flatten() for each in own.values()]).norm())
                for name, each in own.items():
                    sums[name] += each * min(1.0, BOUND / norm)
            for name in shapes:
                learnt[name] -= RATE / len(data) * sums[name]
                plain.move(name, before[name] + SCALING * learnt[name] @ fixed[name])
        layers = {
            name: LoraFactors(factors.A, learnt[name].float())
            for name, factors in state.current.layers.items()
        }
        state = method.end_task(replace(state, current=Adapter(layers, SCALING)))
    return {name: update_of(state, name) for name in shapes}


def update_of(state, name):
    factors = stack(state.parts()).layers[name]
    return factors.B.double() @ factors.A.double()


@THEIRS
def test_the_secure_sum_is_a_plain_sum_over_all_texts(ran):
    assert not [event for event in ran.events if event["event"].endswith("_lost")]
    peft = ran.plain_peft().base_model.model
    for name, expected in expected_changes(ran.experiment).items():
        layer = peft.get_submodule(name)
        delta = layer.get_delta_weight("default").detach().double()
        delta = delta.T if layer.fan_in_fan_out else delta
        largest = float(expected.abs().max())
        assert largest > 3e-3
        off = float((delta - expected).abs().max()) / largest
        assert off < 1e-2, name


def outputs(module, family):
    ids = torch.tensor([[5, 6, 7, 20, 21, 22, 23]])
    asked = {"decoder_input_ids": torch.tensor([[1, 18, 19]])} if family == "seq2seq-lm" else {}
    with torch.no_grad():
        found = module(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    return found.last_hidden_state if family == "encoder-labels" else found.logits


@THEIRS
def test_peft_alone_gives_the_numbers_of_the_loaded_predictor(ran):
    family = ran.experiment.model.family
    theirs = outputs(ran.plain_peft(), family)
    ours = outputs(ran.predictor().model.module, family)
    untaught = outputs(LOADERS[family].from_pretrained(ran.base).eval(), family)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert float((theirs - untaught).abs().max()) > 1e-2


@pytest.mark.slow
def test_and_records_are_protected(make_experiment, tmp_path):
    private = ("privacy.mechanism=record", "privacy.noise_share=sum", "privacy.target_delta=1e-3")
    ran = played(make_experiment, "gpt2", tmp_path, *private)
    assert not [event for event in ran.events if event["event"].endswith("_lost")]
    spent = read_results(ran.folder).privacy.epsilon
    assert len(spent) == 3
    assert all(0 < epsilon <= 8.0 for epsilon in spent.values())
    factors = learnt_adapter(ran.folder)
    for layer in {key.partition(".lora_")[0] for key in factors}:
        A, B = (factors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        assert np.linalg.matrix_rank(B @ A, tol=1e-5) == RANK * len(LABELS)
