"""The examples of docs/extending.md work: taken from the page, registered as it says, and run."""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from deal_core.aggregation.rule import LORA_B, ClientUpdate, finished
from deal_core.aggregation.rules import AGGREGATION_RULES, make_rule
from deal_core.config.experiment import AggregationConfig, RetentionConfig
from deal_core.deal.retention import retain
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, spectrum
from server.results import read_results
from tests.simulations.runs import learnt_adapter, simulated
from tests.sizes import TINY, TWO_LAYERS

pytestmark = pytest.mark.usefixtures("one_model")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Example:
    """A section's blocks: the new file, and the lines of registries."""

    file: str
    code: str
    lines: tuple[tuple[str, str, str], ...]
    """Module, name of its dict, and the line that joins it."""


def example(title):
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    (file, code), *registered = re.findall(r"```python\n# ([^\n]+)\n(.*?)```", section, re.DOTALL)
    lines = []
    for where, line in registered:
        path, name = where.split(": ")
        module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        lines.append((module, name, line))
    return Example(file, code, tuple(lines))


@pytest.fixture
def added(monkeypatch):
    """``added(title)``: import the section's file from the page, and add its lines."""

    def add(title):
        one = example(title)
        assert not (ROOT / one.file).exists()  # else the page is no longer an example
        module = ModuleType(one.file.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(one.code, f"docs/extending.md: {one.file}", "exec"), module.__dict__)
        for where, name, line in one.lines:
            registry = importlib.import_module(where)
            entries = eval(f"{{{line}}}", {**registry.__dict__, **module.__dict__})
            for key, value in entries.items():
                monkeypatch.setitem(getattr(registry, name), key, value)
        return module

    return add


@pytest.fixture
def results(make_experiment, tmp_path):
    """``results(*overrides)``: of a whole run through the real apps, and its adapter."""

    def run(*overrides):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        simulated(make_experiment(*overrides), folder)
        return read_results(folder), learnt_adapter(folder)

    return run


def test_a_method(added, results, monkeypatch):
    module = added("A method")
    one_round = (*TINY, 'data.tasks=["surgery"]', "federation.rounds=1")
    several_steps = (*one_round, "train.batch_size=2")  # in the first one nothing has moved yet
    _, near = results("method.name=fedprox", *several_steps)
    monkeypatch.setattr(module, "MU", 0.0)
    _, free = results("method.name=fedprox", *several_steps)
    lengths = [
        sum(float(np.square(value).sum()) for key, value in adapter.items() if "lora_B" in key)
        for adapter in (near, free)
    ]
    assert lengths[0] < lengths[1]  # lora_B starts at 0: the term keeps it small


def test_a_retention(added, random_adapter):
    added("A retention")
    adapter = random_adapter({"q": (6, 9), "v": (7, 5)}, 5, 2.0, 0)
    kept = retain(adapter, 3, RetentionConfig(filter="soft"))
    for name, factors in adapter.layers.items():
        S, shrunk = spectrum(factors, 2.0).S, spectrum(kept.layers[name]).S
        torch.testing.assert_close(shrunk, S[:3] - S[3], rtol=1e-5, atol=1e-5)


def test_an_aggregation_rule(added, random_adapter):
    added("An aggregation rule")
    before = random_adapter({"q": (6, 5), "v": (4, 5)}, 2, 2.0, 0)
    others = [random_adapter({"q": (6, 5), "v": (4, 5)}, 2, 2.0, seed) for seed in (1, 2)]
    rule = make_rule(AggregationConfig(rule="half-way"))
    assert rule.trained == {LORA_B}
    aggregation = rule.begin(before)
    for name, weight, other in zip("ab", (1.0, 3.0), others, strict=True):
        layers = {n: LoraFactors(before.layers[n].A, f.B) for n, f in other.layers.items()}
        aggregation.add(ClientUpdate(name, Adapter(layers, 2.0), weight))
    result = finished(aggregation)
    mean = {
        n: LoraFactors(f.A, 0.25 * others[0].layers[n].B + 0.75 * others[1].layers[n].B)
        for n, f in before.layers.items()
    }
    for name, start in before.layers.items():
        expected = (start.B + mean[name].B) / 2
        assert torch.allclose(result.current.layers[name].B, expected, atol=1e-6)
        assert torch.equal(result.current.layers[name].A, start.A)
    error = relative_difference(result.current, Adapter(mean, 2.0))
    assert result.residual is None
    assert result.error == pytest.approx(error, rel=1e-5)
    assert "half-way" in AGGREGATION_RULES


def test_a_model_family(added, results):
    added("A model family")
    short = ("data.max_test=32", "federation.rounds=1", "data.max_train=4", TWO_LAYERS)
    prefixed, _ = results("model.family=query-encoder", 'data.tasks=["laboratory"]', *short)
    plain, _ = results('data.tasks=["laboratory"]', *short)
    assert prefixed.zero_shot != plain.zero_shot  # the prefix is seen
    assert prefixed.average_accuracy is not None


COLOURS = {"warm": ("red", "orange"), "cold": ("blue", "green")}


def test_a_data_source(added, results, tmp_path):
    added("A data source")
    root = tmp_path / "data"
    for task, labels in COLOURS.items():
        for split, count in (("train", 4), ("test", 2)):
            for label in labels:
                folder = root / task / split / label
                folder.mkdir(parents=True)
                for number in range(count):
                    text = f"{split} note {number}: the door was painted {label} last year"
                    (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    learnt, _ = results(
        *("data.source=text-folders", f'data.path="{root}"', 'data.tasks=["warm", "cold"]'),
        *(TWO_LAYERS, "federation.rounds=1"),
    )
    assert learnt.tasks == ["warm", "cold"]
    assert learnt.average_accuracy == 1.0  # the label stands in the text
