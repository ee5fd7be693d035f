"""Baselines ``olora`` and ``slao`` against their formulas."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.baselines.memory import Replay, kept_examples, paired
from deal_core.baselines.sequential import in_use, overlap
from deal_core.config.experiment import AdapterConfig, MethodConfig
from deal_core.data import Example
from deal_core.deal.interface import LocalTask, TaskDataset, TaskHistory
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.adapter import zero_adapter as zeros
from deal_core.lora.attach import CURRENT, lora_layers, set_trainable
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.models.interface import Encoded
from deal_core.randomness import seeded
from deal_core.training.loop import load_state
from server.run import Checkpoint, History, load_checkpoint, save_checkpoint
from simulations.run.model_checks import check_aggregation

BOTH = frozenset({"lora_A", "lora_B"})


@pytest.fixture(scope="module")
def second_task(shapes, random_adapter):
    """A current adapter that shares directions with the retained one."""
    drawn = [random_adapter(shapes, 8, 2.0, 1), random_adapter(shapes, 8, 1.0, 2)]
    small = [
        Adapter({n: LoraFactors(f.A * 0.05, f.B * 0.02) for n, f in a.layers.items()}, a.scaling)
        for a in drawn
    ]
    return State(*small)


def rows(state):
    return {n: f.A for n, f in state.retained.layers.items()}


def test_the_penalty_and_its_gradient_are_those_of_the_dense_formula(minilm, second_task):
    load_state(minilm, second_task)
    set_trainable(minilm.module, BOTH)
    found = overlap(minilm.module, rows(second_task), 0.5)
    expected = 0.0
    for name, earlier in second_task.retained.layers.items():
        for old in earlier.A:
            for new in second_task.current.layers[name].A:
                expected += 0.5 * float(old @ new) ** 2
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    found.backward()
    for name, layer in lora_layers(minilm.module).items():
        old = second_task.retained.layers[name].A
        products = old @ second_task.current.layers[name].A.T
        torch.testing.assert_close(
            layer.lora_A[CURRENT].weight.grad, products.T @ old, rtol=1e-4, atol=1e-5
        )
        assert layer.lora_B[CURRENT].weight.grad is None


def test_a_round_that_leaves_a_alone_has_no_penalty(minilm, second_task):
    load_state(minilm, second_task)
    set_trainable(minilm.module, frozenset({"lora_B"}))
    assert overlap(minilm.module, rows(second_task), 1.0) is None


def test_every_task_is_kept_whole_and_the_model_grows_by_its_rank(random_adapter):
    shapes = {"first": (40, 50), "second": (60, 40)}
    config = AdapterConfig(rank=4, retained_rank=6, lora_alpha=8.0)
    method = make_method(MethodConfig(name="olora"), config)
    state, is_nonzero = State(zeros(shapes, 4, 2.0), zeros(shapes, 6)), []
    for task in range(4):
        state = method.begin_task(state, seeded(task))
        drawn = random_adapter(shapes, 4, 2.0, task)
        layers = {n: LoraFactors(f.A, drawn.layers[n].B) for n, f in state.current.layers.items()}
        is_nonzero.append(Adapter(layers, 2.0))
        state = method.end_task(State(is_nonzero[-1], state.retained, state.residual))
        assert state.retained.rank == 4 * (task + 1)
        assert relative_difference(state.retained, stack(is_nonzero)) < 1e-6
    for name, f in state.retained.layers.items():
        assert torch.equal(f.A, torch.cat([one.layers[name].A for one in is_nonzero]))


def test_directions_that_change_nothing_are_left_out(random_adapter):
    shapes = {"first": (40, 50), "second": (60, 40)}
    assert in_use(zeros(shapes, 6)).rank == 1
    learnt = random_adapter(shapes, 3, 1.0, 1)
    assert in_use(stack([zeros(shapes, 6), learnt])).rank == 3


SHAPES = {"first": (40, 50), "second": (60, 40)}
METHOD = make_method(MethodConfig(name="slao"), AdapterConfig(rank=4, lora_alpha=8.0))


def fine_tuned(state, random_adapter, seed):
    """Pretend that clients moved both factors."""
    drawn = random_adapter(SHAPES, 4, 2.0, seed)
    layers = {
        n: LoraFactors(f.A + 0.1 * drawn.layers[n].A, f.B + drawn.layers[n].B)
        for n, f in state.current.layers.items()
    }
    return replace(state, current=Adapter(layers, 2.0))


def test_four_tasks_are_those_of_the_paper_s_equations(random_adapter):
    """Told again with two adapters kept by hand: the merged one, and the fine-tuned one."""
    state = State(zero_adapter(SHAPES, 4, 2.0), zero_adapter(SHAPES, 6))
    merged = {}
    last = {}
    for t in range(1, 5):
        state = METHOD.begin_task(state, seeded(t))
        for name, f in state.current.layers.items():
            if t == 1:
                assert not f.B.any()
                continue
            torch.testing.assert_close(f.B, last[name].B)
            torch.testing.assert_close(f.A @ f.A.T, torch.eye(4), rtol=0, atol=1e-5)
            inside = last[name].A @ f.A.T @ f.A  # the old rows lie in the span of the new ones
            torch.testing.assert_close(inside, last[name].A, rtol=1e-4, atol=1e-5)
        state = fine_tuned(state, random_adapter, t)
        last = dict(state.current.layers)
        state = METHOD.end_task(state)
        for name, f in last.items():
            before = merged.get(name, torch.zeros_like(f.B))
            merged[name] = before + (f.B - before) / math.sqrt(t)
            torch.testing.assert_close(state.current.layers[name].A, f.A, rtol=0, atol=0)
            torch.testing.assert_close(state.current.layers[name].B, merged[name])
        assert relative_difference(stack(state.parts()), state.current) < 1e-6


@pytest.mark.parametrize("ended", [True, False])
def test_what_the_server_keeps_survives_a_checkpoint(random_adapter, tmp_path, ended):
    state = State(zero_adapter(SHAPES, 4, 2.0), zero_adapter(SHAPES, 6))
    state = METHOD.end_task(fine_tuned(METHOD.begin_task(state, seeded(0)), random_adapter, 0))
    if not ended:
        state = fine_tuned(METHOD.begin_task(state, seeded(1)), random_adapter, 1)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(position=1, state=state, history=History()))
    read = load_checkpoint(path, SHAPES).state
    following = [
        METHOD.begin_task(each, seeded(1)) if ended else METHOD.end_task(each)
        for each in (state, read)
    ]
    for name, f in following[0].current.layers.items():
        assert torch.equal(f.A, following[1].current.layers[name].A)
        assert torch.equal(f.B, following[1].current.layers[name].B)


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_rule_that_changes_coordinates_is_refused(make_experiment, rule):
    experiment = make_experiment("method.name=slao", f"aggregation.rule={rule}")
    with pytest.raises(UserError, match="use fedit, ffa"):
        check_aggregation(experiment)


LABELS = ("Anatomy", "Surgery")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("Bones", "Anatomy"),
]
FIRST, SECOND = ("Dental", "Skin", "Eye"), ("Heart", "Lung")
OLD = [
    (FIRST, [Example("Caries of the lower molar", "Dental"), Example("Blurred vision", "Eye")]),
    (SECOND, [Example("A murmur in systole", "Heart"), Example("Wheezing", "Lung")]),
]


def past(shares):
    return TaskHistory([lambda share=share: share for share in shares], None, len(shares))


def numbered(count, first=0):
    return TaskDataset(("a",), [Encoded((first + i,), 0) for i in range(count)])


@pytest.fixture(scope="module")
def start(shapes):
    empty = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    return make_method(MethodConfig(name="replay"), AdapterConfig()).begin_task(empty, seeded(0))


@pytest.fixture(scope="module")
def old_shares(minilm):
    return [TaskDataset(labels, minilm.encode(examples, labels)) for labels, examples in OLD]


def objective(minilm, state, shares, **settings):
    data = minilm.encode(DATA, LABELS)
    task = LocalTask(minilm, state, data, LABELS, (FIRST, SECOND), past(shares))
    built = Replay(AdapterConfig(), **settings)
    return built.objective(task), data


def test_losses_are_those_of_single_examples_each_in_its_own_label_space(minilm, start, old_shares):
    load_state(minilm, start)
    built, data = objective(minilm, start, old_shares, share=1.0)
    labels = [FIRST, SECOND]
    with torch.no_grad():
        found = built.example_losses([2, 0, 1])
        for loss, i in zip(found, [2, 0, 1], strict=True):
            position, old = built.partners[i]
            one, other = minilm.scores([data[i]], LABELS), minilm.scores([old], labels[position])
            expected = cross_entropy(one, torch.tensor([data[i].target])) + cross_entropy(
                other, torch.tensor([old.target])
            )
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert {position for position, _ in built.partners} == {0, 1}


def test_a_share_of_every_earlier_task_is_kept_the_same_in_all_later_ones():
    shares = [numbered(40), numbered(5, 100), numbered(0)]
    kept = kept_examples(past(shares), 0.1)
    assert Counter(position for position, _ in kept) == {0: 4, 1: 1}
    assert len(set(kept)) == 5
    assert all(example in shares[position].data for position, example in kept)
    assert kept_examples(past([*shares, numbered(20, 200)]), 0.1)[:5] == kept
    assert len(kept_examples(past(shares), 1.0)) == 45
    assert kept_examples(past(shares), 0.0) == []
    assert len(kept_examples(past([numbered(100)]), 0.07)) == 7  # the float is 7.000000000000001


def test_every_old_example_comes_equally_often():
    old = kept_examples(past([numbered(7)]), 1.0)
    counts = Counter(paired(old, 24, seeded(1)))
    assert len(counts) == 7
    assert set(counts.values()) == {3, 4}
    assert len(paired(old, 3, seeded(1))) == 3


def test_partners_change_with_the_round(minilm, start, random_adapter, old_shares):
    many = [TaskDataset(FIRST, old_shares[0].data * 20)]
    later = State(random_adapter(start.current.shapes, 8, 2.0, 1), start.retained)
    first, _ = objective(minilm, start, old_shares, share=1.0)
    again, _ = objective(minilm, start, old_shares, share=1.0)
    second, _ = objective(minilm, later, old_shares, share=1.0)
    assert first.partners == again.partners
    assert first.partners != second.partners
    assert len(objective(minilm, start, many, share=1.0)[0].partners) == 3
    apart = State(start.current, start.retained, random_adapter(start.current.shapes, 2, 1.0, 3))
    third, _ = objective(minilm, apart, old_shares, share=1.0)  # what flora has learnt
    assert first.partners != third.partners
