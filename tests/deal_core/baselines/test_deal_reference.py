"""Baseline ``deal-reference``: gate, MLP and map against their formulas, and what clients make of
them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from client.state import RoundStore
from deal_core.baselines.deal_reference import (
    SMALLEST,
    Constants,
    DealReference,
    Mapped,
    drawn_mlp,
    flat,
    fresh_map,
    fresh_maps,
    gate,
    mlp,
    open_gate,
    penalty,
)
from deal_core.config.experiment import AdapterConfig, TrainConfig
from deal_core.data import Example
from deal_core.deal.interface import LocalTask
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.attach import CURRENT, factors_in, lora_layers, read, set_trainable
from deal_core.lora.payload import PREFIX, factor_of
from deal_core.lora.state import State, by_key, start_of
from deal_core.randomness import seeded
from deal_core.training.loop import (
    NonPrivateGradients,
    load_state,
    mean_gradient,
    run_local_steps,
)

LABELS = ("Anatomy", "Surgery")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("The ulnar nerve", "Anatomy"),
]
BOTH = frozenset({"lora_A", "lora_B"})


def made(**keys):
    return DealReference(AdapterConfig(), Constants(**keys))


def spread(shapes, seed):
    """Factors with wide spectra, as training leaves them: gates are open."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 0, 8)
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        A = torch.linalg.qr(torch.randn(d_in, 8, generator=generator)).Q.T
        B = torch.linalg.qr(torch.randn(d_out, 8, generator=generator)).Q
        layers[name] = LoraFactors(0.6 * scale[:, None] * A, 0.3 * B * scale)
    return Adapter(layers, 2.0)


@pytest.fixture(scope="module")
def begun(shapes):
    """The second task begins."""
    before = State(spread(shapes, 1), zero_adapter(shapes, 16))
    return made().begin_task(before, seeded(0))


def objective(minilm, state, round_state=None, **keys):
    load_state(minilm, state)
    task = LocalTask(minilm, state, data(minilm), LABELS, (("Dental",),), round_state=round_state)
    found = made(**keys).objective(task)
    assert isinstance(found, Mapped)
    return found


def data(minilm):
    return minilm.encode(DATA, LABELS)


def one_round(minilm, state, round_state=None, epochs=1, trained=BOTH, **keys):
    """The state that an average over one client is."""
    built = objective(minilm, state, round_state, **keys)
    config = TrainConfig(batch_size=2)
    gradients = NonPrivateGradients(data(minilm), epochs, config, seeded("train"))
    run_local_steps(minilm, built, gradients, trained, config)
    return replace(state, current=read(minilm.module))


def test_the_first_task_is_plain_and_a_later_one_begins_with_drawn_maps(minilm, shapes, begun):
    method, empty = made(), State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    first = method.begin_task(empty, seeded(0))
    load_state(minilm, first)
    plain = method.objective(LocalTask(minilm, first, data(minilm), LABELS, ()))
    assert plain.penalty() is None
    assert not isinstance(plain, Mapped)
    before = spread(shapes, 1)
    assert relative_difference(begun.retained, before) < 1e-6  # where clients find the start
    # what was known is gone
    assert relative_difference(stack(begun.parts()), before) > 0.9


def test_server_and_clients_make_the_same_start(minilm, begun):
    """So that in the first round a client's factors are its maps'."""
    maps = objective(minilm, begun).maps
    for key, factor in by_key(begun.current).items():
        torch.testing.assert_close(maps[key].factor(), factor, rtol=1e-5, atol=1e-7)
    again = fresh_maps(start_of(begun).current, Constants())
    other = fresh_maps(start_of(begun).current, Constants(seed=43))
    key = next(iter(maps))
    assert torch.equal(again[key].factor(), maps[key].factor())
    assert not torch.equal(other[key].factor(), maps[key].factor())


@pytest.mark.parametrize("powers", [(5.0, 2.0), (3.0, 1.5)])
def test_the_penalty_and_its_gradient_are_the_formula(powers):
    a, b = powers
    config = Constants(lambda1=0.3, lambda2=0.2, a=a, b=b)
    generator = seeded("penalty")
    starts = [torch.randn(shape, generator=generator) for shape in ((4, 30), (20, 4))]
    maps = [fresh_map(start, 4, generator) for start in starts]
    learned = [t.requires_grad_() for m in maps for t in m.learned.values()]
    found = penalty(maps, config)
    found.backward()
    expected = 0.0
    for m in maps:
        for weight, power, part in ((0.3, a, "gate."), (0.2, b, "mlp.")):
            for tensor in (t for name, t in m.learned.items() if name.startswith(part)):
                values = tensor.detach().double().numpy()
                expected += weight * float((np.abs(values) ** power).sum())
                slope = weight * power * np.abs(values) ** (power - 1) * np.sign(values)
                np.testing.assert_allclose(tensor.grad.numpy(), slope, rtol=1e-4, atol=1e-6)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    assert len(learned) == 2 * (3 + 4)


def end_to_end(minilm, built):
    """Gradients by one ordinary backward pass through maps and model together."""
    for m in built.maps.values():
        for tensor in m.learned.values():
            tensor.requires_grad_().grad = None
    linears = {
        f"{PREFIX}{name}.{factor}.weight": getattr(layer, factor)[CURRENT]
        for name, layer in lora_layers(minilm.module).items()
        for factor in ("lora_A", "lora_B")
    }
    leaves = {key: linear._parameters.pop("weight") for key, linear in linears.items()}
    for key, linear in linears.items():
        linear.weight = built.maps[key].factor()
    try:
        (built.example_losses(range(len(DATA))).mean() + built.penalty()).backward()
    finally:
        for key, linear in linears.items():
            del linear.weight
            linear._parameters["weight"] = leaves[key]
    return taken(built)


def taken(built):
    gradients = {}
    for key, m in built.maps.items():
        for name, tensor in m.learned.items():
            gradients[f"{key}/{name}"], tensor.grad = tensor.grad, None
    return gradients


def test_gradients_reach_every_part_of_gate_and_mlp(minilm, begun):
    """Through the factors, in passes, as through all at once; and nothing else learns."""
    built = objective(minilm, begun, lambda1=0.0, lambda2=0.0)
    expected = end_to_end(minilm, built)
    set_trainable(minilm.module, BOTH)
    parametrization = built.parametrization(minilm.module, BOTH)
    mean_gradient(built, data(minilm), [0, 1, 2], 20)  # a pass an example
    built.penalty().backward()
    parametrization.before_step()
    found = taken(built)
    assert len(found) == len(parametrization.parameters) == 7 * 2 * 12
    for key, gradient in expected.items():
        assert gradient.any(), key
        assert (found[key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, key
    assert all(p.grad is None for p in factors_in(minilm.module).values())


def test_one_client_trains_its_maps_as_if_there_were_no_federation(minilm, begun, tmp_path):
    """Over rounds the factors are the maps', and no round begins at the task's start again."""
    state, before = begun, dict(objective(minilm, begun).maps)
    for server_round in (1, 2):
        store = RoundStore(tmp_path, 1, server_round)
        state = one_round(minilm, state, store)
        maps = objective(minilm, state, RoundStore(tmp_path, 1, server_round + 1)).maps
        for key, factor in by_key(state.current).items():
            gap = (maps[key].factor() - factor).norm()
            assert gap < 1e-4 * factor.norm(), (server_round, key)
            assert not torch.equal(maps[key].factor(), before[key].factor())
        before = dict(maps)


def test_what_others_learnt_stays_beside_the_clients_own_map(minilm, begun, shapes, tmp_path):
    alone = one_round(minilm, begun, RoundStore(tmp_path, 1, 1))
    others = spread(shapes, 5)
    averaged = {
        n: LoraFactors(0.5 * f.A + 0.1 * others.layers[n].A, 0.5 * f.B + 0.1 * others.layers[n].B)
        for n, f in alone.current.layers.items()
    }
    state = replace(begun, current=Adapter(averaged, 2.0))
    start = objective(minilm, state, RoundStore(tmp_path, 1, 2)).maps
    after = one_round(minilm, state, RoundStore(tmp_path, 1, 2))
    now = objective(minilm, after, RoundStore(tmp_path, 1, 3)).maps
    received, learnt = by_key(state.current), by_key(after.current)
    for key in received:
        moved = now[key].factor() - start[key].factor()
        assert moved.norm() > 0
        torch.testing.assert_close(learnt[key] - received[key], moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trained", [{"lora_A"}, {"lora_B"}])
def test_only_maps_of_factors_that_learn_move_and_are_priced(minilm, begun, trained, tmp_path):
    before = flat(objective(minilm, begun).maps)
    one_round(minilm, begun, RoundStore(tmp_path, 1, 1), trained=frozenset(trained))
    after = flat(objective(minilm, begun, RoundStore(tmp_path, 1, 2)).maps)
    for key, value in after.items():
        learns = factor_of(key.split("/")[0]) in trained
        assert torch.equal(value, before[key]) != learns, key


def phi(s, centre, width):
    return math.exp(-((s - centre) ** 2) / (2 * width))


def gated(s, learned):
    """Eq. 10 with phi at minus s for its inverse, number by number."""
    centres, gains = learned["gate.centres"].tolist(), learned["gate.gains"].tolist()
    widths = [max(math.exp(w), SMALLEST) for w in learned["gate.log_widths"].tolist()]
    passed = []
    for k, value in enumerate(s.tolist()):
        total = 0.0
        for j, (c, w) in enumerate(zip(centres, widths, strict=True)):
            total += phi(value, c, w) * gains[j][k] * phi(-value, c, w) * value
        passed.append(max(total, 0.0))
    return passed


@pytest.mark.parametrize("kernels", [2, 4, 7])
def test_a_gate_is_the_formula(kernels):
    generator = seeded("gate", kernels)
    s = torch.rand(6, generator=generator, dtype=torch.float64).sort(descending=True).values
    start = open_gate(s, kernels)
    moved = {
        name: part + 0.5 * torch.randn(part.shape, generator=generator, dtype=part.dtype)
        for name, part in start.items()
    }
    for learned in (start, moved):
        np.testing.assert_allclose(
            gate(s, learned).numpy(), gated(s, learned), rtol=1e-10, atol=1e-300
        )
    turned = {**moved, "gate.gains": -moved["gate.gains"]}
    assert any(value == 0.0 for value in gated(s, turned))


@pytest.mark.parametrize("value", [0.6, 0.0])
def test_a_flat_spectrum_does_not_pass(value):
    """As under an orthogonal start, and before anything was learnt."""
    s = torch.full((5,), value)
    learned = open_gate(s, 4)
    assert all(part.isfinite().all() for part in learned.values())
    assert not gate(s, learned).any()


@pytest.mark.parametrize(("n", "hidden", "count"), [(16, 128, 4_240), (1024, 512, 1_050_112)])
def test_an_mlp_is_torchs_on_the_columns(n, hidden, count):
    """Sizes as published, for a factor of rank 16 and a layer of 1,024 outputs."""
    learned = drawn_mlp(n, seeded("mlp"))
    parts = list(learned.values())
    assert sum(part.numel() for part in parts) == count
    dense = nn.Sequential(nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, n))
    for parameter, part in zip(dense.parameters(), parts, strict=True):
        parameter.data = part
    matrix = torch.randn(n, 7, generator=seeded("columns"))
    with torch.no_grad():
        torch.testing.assert_close(mlp(matrix, learned), dense(matrix.T).T)


@pytest.mark.parametrize("shape", [(4, 50), (60, 4)])
def test_a_map_is_the_mlp_of_the_gated_factor(shape):
    start = 0.3 * torch.randn(shape, generator=seeded("start"))
    made = fresh_map(start, 4, seeded("mlp"))
    U, s, Vh = np.linalg.svd(start.double().numpy(), full_matrices=False)
    kept = U @ np.diag(gated(torch.from_numpy(s), made.learned)) @ Vh
    hidden = np.maximum(made.learned["mlp.hidden_weight"].double().numpy() @ kept, 0.0)
    expected = made.learned["mlp.out_weight"].double().numpy() @ hidden
    assert np.abs(expected).max() > 0.0
    np.testing.assert_allclose(made.factor().numpy(), expected, atol=1e-4 * np.abs(expected).max())
