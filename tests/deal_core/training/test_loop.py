"""Batches, passes, what is merged and what the teacher is of a local training."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config.experiment import AdapterConfig, MethodConfig, TrainConfig
from deal_core.data import Example
from deal_core.deal.distillation import make_teacher
from deal_core.deal.interface import LocalTask
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.attach import lora_layers, merge, set_trainable, write
from deal_core.lora.state import State
from deal_core.methods import make_method
from deal_core.models.interface import Encoded
from deal_core.randomness import seeded
from deal_core.training.hardware import compute_dtype
from deal_core.training.loop import (
    load_state,
    mean_gradient,
    training_batches,
    within_budget,
)

LABELS = ("Anatomy", "Surgery")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("Bones", "Anatomy"),
    Example("A suture for the bowel that is absorbed after two weeks or so", "Surgery"),
]


def random_state(shapes, random_adapter, residual):
    small = [random_adapter(shapes, r, 0.003, seed) for r, seed in ((8, 0), (16, 1), (3, 2))]
    return State(small[0], small[1], small[2] if residual else None)


def gradients(model):
    return [p.grad.clone() for p in model.module.parameters() if p.requires_grad]


def test_cutting_a_batch_into_passes_changes_only_rounding(minilm, shapes, random_adapter):
    state = random_state(shapes, random_adapter, residual=False)
    method = make_method(MethodConfig(), AdapterConfig())
    data = minilm.encode(DATA, LABELS)
    found = []
    for tokens in (10_000, 1):
        load_state(minilm, state)
        set_trainable(minilm.module, frozenset({"lora_A", "lora_B"}))
        task = LocalTask(minilm, state, data, LABELS, (("Dental", "Skin"),))
        objective = method.objective(task)
        loss = mean_gradient(objective, data, range(4), tokens)
        found.append((loss, gradients(minilm)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for whole, cut in zip(found[0][1], found[1][1], strict=True):
        assert (whole - cut).norm() < 1e-3 * whole.norm() + 1e-7


def test_merging_again_and_again_drifts_nowhere(minilm, shapes, random_adapter):
    state = random_state(shapes, random_adapter, residual=True)
    layer = next(iter(lora_layers(minilm.module).values()))
    base = layer.weights.pretrained.clone()
    load_state(minilm, state)
    get_or_compute = layer.base_layer.weight.clone()
    for _ in range(5):
        load_state(minilm, State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)))
        assert torch.equal(layer.base_layer.weight, base)
        load_state(minilm, state)
    assert torch.equal(layer.base_layer.weight, get_or_compute)
    merge(minilm.module, zero_adapter(shapes, 16), None)


def test_what_is_merged_already_is_not_merged_again(minilm, shapes, random_adapter, monkeypatch):
    first, second = (random_state(shapes, random_adapter, residual=r) for r in (True, False))
    layer = next(iter(lora_layers(minilm.module).values()))
    load_state(minilm, first)
    place, weight = layer.base_layer.weight.data_ptr(), layer.base_layer.weight.data.clone()
    load_state(minilm, State(second.current, first.retained, first.residual))
    assert layer.base_layer.weight.data_ptr() == place
    load_state(minilm, State(first.current, first.retained))  # the residual is gone
    assert not torch.equal(layer.base_layer.weight, weight)
    load_state(minilm, first)
    assert torch.equal(layer.base_layer.weight, weight)
    load_state(minilm, State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)))


def test_adapters_of_another_model_are_refused(minilm, shapes):
    with pytest.raises(ValueError, match="other layers"):
        write(minilm.module, zero_adapter({"elsewhere": (4, 4)}, 2))
    with pytest.raises(ValueError, match="other layers"):
        merge(minilm.module, zero_adapter({"elsewhere": (4, 4)}, 2), None)
    load_state(minilm, State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)))


@pytest.mark.parametrize("limit", [2**25, 1])
def test_the_teacher_is_the_start_of_the_task_cached_or_not(
    minilm, shapes, random_adapter, monkeypatch, limit
):
    monkeypatch.setattr("deal_core.deal.distillation.CACHED_FLOATS", limit)
    state = random_state(shapes, random_adapter, residual=True)
    data = minilm.encode(DATA, LABELS)
    seen = ("Dental", "Skin")
    load_state(minilm, State(zero_adapter(shapes, 8, 2.0), state.retained))
    with torch.no_grad():
        expected = minilm.scores(data, seen)
    load_state(minilm, state)
    teacher = make_teacher(minilm, data, LABELS, (seen,))
    answers = torch.cat(teacher([2, 0]))
    torch.testing.assert_close(answers, expected[[2, 0]], rtol=0, atol=1e-4)


def test_the_teacher_is_asked_once_for_all_rounds_and_again_when_its_basis_changes(
    minilm, shapes, random_adapter, monkeypatch
):
    asked = []
    real = make_teacher
    monkeypatch.setattr(
        "deal_core.deal.distillation.make_teacher",
        lambda *args: asked.append(1) or real(*args),
    )
    method = make_method(MethodConfig(), AdapterConfig())
    state = random_state(shapes, random_adapter, residual=False)
    load_state(minilm, state)
    task = LocalTask(minilm, state, minilm.encode(DATA, LABELS), LABELS, (("Dental",),))
    for _ in range(3):
        method.objective(task)
    assert len(asked) == 1
    task = replace(task, state=State(state.current, random_adapter(shapes, 16, 0.003, 9)))
    method.objective(task)
    method.objective(replace(task, seen=(("Dental", "Skin"),)))
    assert len(asked) == 3


def test_precision_is_what_is_asked_for():
    cpu = torch.device("cpu")
    assert compute_dtype(TrainConfig(precision="float32"), cpu) == torch.float32
    assert compute_dtype(TrainConfig(precision="bfloat16"), cpu) == torch.bfloat16
    able = torch.cpu.get_capabilities()
    fast = able.get("amx_bf16") or able.get("avx512_bf16")
    expected = torch.bfloat16 if fast else torch.float32
    assert compute_dtype(TrainConfig(), cpu) == expected
    # records of encoders share passes in float32 alone
    assert compute_dtype(TrainConfig(), cpu, needs_float32=True) == torch.float32


LENGTHS = st.lists(st.integers(1, 600), max_size=120)


def texts(lengths):
    return [Encoded((7,) * length, 0) for length in lengths]


@given(LENGTHS, st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_has_every_example_once_in_full_batches(lengths, batch_size, seed):
    batches = training_batches(texts(lengths), batch_size, seeded(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert len(batches) <= len(lengths) // batch_size + 1


def test_batches_have_similar_lengths():
    lengths = torch.randint(1, 100, (1600,), generator=seeded("lengths")).tolist()
    whole = torch.tensor(lengths).float().std()

    batches = training_batches(texts(lengths), 16, seeded(1))
    spreads = [torch.tensor([lengths[i] for i in batch]).float().std() for batch in batches]
    assert torch.stack(spreads).mean() < 0.1 * whole


@given(LENGTHS, st.integers(1, 1000), st.none() | st.integers(0, 500))
def test_passes_keep_the_order_and_the_budget(lengths, tokens, waste):
    data = texts(lengths)
    passes = within_budget(data, range(len(data)), tokens, waste)
    assert [i for part in passes for i in part] == list(range(len(data)))
    for part in passes:
        padded = len(part) * max(lengths[i] for i in part)
        assert padded <= tokens or len(part) == 1
        assert waste is None or padded - sum(lengths[i] for i in part) <= waste
