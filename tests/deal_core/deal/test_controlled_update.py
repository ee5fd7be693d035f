from dataclasses import replace

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, MethodConfig, UpdateConfig
from deal_core.data import Example
from deal_core.deal.interface import LocalTask
from deal_core.deal.method import layer_penalty, make_anchors, update_penalty
from deal_core.lora.adapter import Adapter, LoraFactors, Spectrum, compress, zero_adapter
from deal_core.lora.attach import CURRENT, lora_layers, set_trainable
from deal_core.lora.state import State, snapshot_task_start
from deal_core.methods import make_method
from deal_core.randomness import seeded
from deal_core.training.loop import Cache, load_state, mean_gradient

SHAPES = {"first": (12, 20), "second": (30, 16)}
BOTH = frozenset({"lora_A", "lora_B"})
CPU = torch.device("cpu")


def config(**keys):
    return UpdateConfig.model_validate({"lambda1": 0.01, "lambda2": 0.001, **keys})


def exact(anchor):
    """Orthonormal in float64, so that the comparison with the dense formula is sharp."""
    U, V = (torch.linalg.qr(part.double()).Q for part in (anchor.U, anchor.Vh.T))
    return Spectrum(U, anchor.S.double(), V.T)


def drawn(random_adapter, seed):
    anchor = exact(make_anchors(random_adapter(SHAPES, 5, 1.0, seed), CPU)["first"])
    factors = random_adapter(SHAPES, 3, 1.0, seed + 100).layers["first"]
    A, B = (f.double().requires_grad_() for f in (factors.A, factors.B))
    return LoraFactors(A, B), anchor


def dense_penalty(update, anchor, c):
    """METHOD's formula word for word on the dense matrices."""
    delta = update.B @ update.A
    total = torch.zeros((), dtype=delta.dtype)
    for u, s, v in zip(anchor.U.T, anchor.S, anchor.Vh, strict=True):
        iota = ((delta @ v).norm() ** 2 + (u @ delta).norm() ** 2).sqrt() / s
        total = total + c.lambda1 * s / anchor.S.sum() * iota**2
    outside = torch.eye(delta.shape[1], dtype=delta.dtype) - anchor.Vh.T @ anchor.Vh
    return total + c.lambda2 * torch.linalg.matrix_norm(delta @ outside) ** 2


def test_value_and_gradient_are_those_of_the_dense_formula(random_adapter):
    for seed in range(3):
        update, anchor = drawn(random_adapter, seed)
        for keys in ({"lambda1": 0.3, "lambda2": 0.7}, {"lambda1": 1.0, "lambda2": 0.0}):
            c = config(**keys)
            got, want = layer_penalty(update, anchor, c), dense_penalty(update, anchor, c)
            torch.testing.assert_close(got, want)
            gradients = [torch.autograd.grad(x, (update.A, update.B)) for x in (got, want)]
            torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_no_update_costs_nothing_and_pulls_nowhere(random_adapter, zero):
    update, anchor = drawn(random_adapter, 0)
    with torch.no_grad():
        for factor in "AB" if zero == "both" else zero:
            getattr(update, factor).zero_()
    cost = layer_penalty(update, anchor, config())
    cost.backward()
    assert cost.item() == 0.0
    assert not update.A.grad.any()
    assert not update.B.grad.any()


def unit_update(left, right):
    return LoraFactors(right[None, :], left[:, None])


def test_interference_costs_more_than_an_update_beside_what_is_retained(random_adapter):
    """Equal size: along a retained direction, only its inputs, only its outputs, neither."""
    _, anchor = drawn(random_adapter, 1)
    beside_u = torch.linalg.qr(anchor.U, mode="complete").Q[:, -1]
    beside_v = torch.linalg.qr(anchor.Vh.T, mode="complete").Q[:, -1]
    u, v = anchor.U[:, 0], anchor.Vh[0]
    size = float(anchor.S[0])
    c = config(lambda1=1.0, lambda2=1e-4)
    along, inputs, outputs, neither = (
        float(layer_penalty(unit_update(size * left, right), anchor, c))
        for left, right in ((u, v), (beside_u, v), (u, beside_v), (beside_u, beside_v))
    )
    assert along > outputs > neither > 0
    assert along > inputs > neither
    # As large as the direction: iota is 1 from either side, the square root of 2 from both.
    weight = float(anchor.S[0] / anchor.S.sum())
    assert inputs == pytest.approx(weight)
    assert outputs == pytest.approx(weight + neither)
    assert along == pytest.approx(2 * weight)
    assert neither == pytest.approx(1e-4 * size**2)


def test_where_nothing_is_retained_only_the_size_counts(random_adapter):
    anchors = make_anchors(zero_adapter(SHAPES, 4), CPU)
    assert all(anchor.S.numel() == 0 for anchor in anchors.values())
    factors = random_adapter(SHAPES, 3, 1.0, 5).layers
    cost = update_penalty(factors, anchors, config(lambda1=9.0, lambda2=0.5))
    sizes = [(f.B @ f.A).square().sum() for f in factors.values()]
    torch.testing.assert_close(cost, 0.5 * torch.stack(sizes).mean())


def test_anchors_are_the_retained_directions_and_leave_out_negligible_ones(random_adapter):
    retained = compress(random_adapter(SHAPES, 5, 1.0, 6), 9)
    strong = retained.layers["first"]
    weak = LoraFactors(strong.A, torch.cat([strong.B[:, :4], 1e-5 * strong.B[:, 4:]], dim=1))
    anchors = make_anchors(Adapter({**retained.layers, "first": weak}), CPU)
    assert anchors["first"].S.numel() == 4
    whole = anchors["second"]
    f = retained.layers["second"]
    torch.testing.assert_close(whole.U * whole.S @ whole.Vh, f.B @ f.A, rtol=0, atol=1e-4)


LABELS = ("Anatomy", "Surgery")
SEEN = ("Dental", "Skin")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
    Example("Bones", "Anatomy"),
    Example("A suture for the bowel that is absorbed after two weeks or so", "Surgery"),
]


@pytest.fixture(scope="module")
def second_task(shapes, random_adapter):
    """Something is retained, and the task begins, afresh: the adapter is the change."""
    retained = random_adapter(shapes, 16, 1.0, 1)
    small = {n: LoraFactors(f.A, 0.003 * f.B) for n, f in retained.layers.items()}
    state = State(zero_adapter(shapes, 8, 2.0), Adapter(small))
    method = make_method(MethodConfig(), AdapterConfig())
    return method.begin_task(state, seeded(0, "begin"))


def size(adapter):
    return sum(float((adapter.scaling * f.B @ f.A).norm()) for f in adapter.layers.values())


def objective_of(minilm, state, cache):
    method = MethodConfig.model_validate({"update": {"lambda1": 100.0, "lambda2": 0.001}})
    load_state(minilm, state)
    data = minilm.encode(DATA, LABELS)
    task = LocalTask(minilm, state, data, LABELS, (SEEN,), cache=cache)
    return make_method(method, AdapterConfig()).objective(task), data


def moved(state, random_adapter):
    """The state in the middle of the task: B is no longer zero."""
    draw = random_adapter(state.current.shapes, 8, 2.0, 7).layers
    layers = {n: LoraFactors(f.A, 0.01 * draw[n].B) for n, f in state.current.layers.items()}
    return State(Adapter(layers, state.current.scaling), state.retained, state.residual)


def test_the_penalty_counts_once_a_step_however_the_batch_is_cut(
    minilm, second_task, random_adapter
):
    objective, data = objective_of(minilm, moved(second_task, random_adapter), Cache())
    price = float(objective.penalty().detach())
    assert price > 0.01
    results = []
    for tokens in (10_000, 1):
        parameters = set_trainable(minilm.module, BOTH)
        for p in parameters:
            p.grad = None
        loss, penalty = mean_gradient(objective, data, range(4), tokens), objective.penalty()
        penalty.backward()
        results.append((loss + float(penalty.detach()), [p.grad.clone() for p in parameters]))
    plain = mean_gradient(objective.objective, data, range(4), 1)
    assert results[0][0] == pytest.approx(plain + price, rel=1e-4)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for whole, cut in zip(results[0][1], results[1][1], strict=True):
        assert (whole - cut).norm() < 1e-3 * whole.norm() + 1e-7


def test_the_price_is_that_of_the_live_factors_and_the_residual(
    minilm, second_task, random_adapter
):
    """What an exact rule put beside the current adapter belongs to the update."""
    state = moved(second_task, random_adapter)
    rest = random_adapter(state.current.shapes, 3, 0.01, 8)
    for residual in (None, rest):
        objective, _ = objective_of(minilm, State(state.current, state.retained, residual), Cache())
        expected = []
        anchors = make_anchors(state.retained, CPU)
        for name, f in state.current.layers.items():
            delta = 2.0 * f.B @ f.A
            if residual is not None:
                delta = delta + 0.01 * rest.layers[name].B @ rest.layers[name].A
            whole = LoraFactors(torch.eye(delta.shape[1]), delta)
            expected.append(dense_penalty(whole, anchors[name], config(lambda1=100.0)))
        before = objective.penalty().detach()
        torch.testing.assert_close(before, torch.stack(expected).mean(), rtol=1e-3, atol=0)
        with torch.no_grad():
            next(iter(lora_layers(minilm.module).values())).lora_B[CURRENT].weight.mul_(2.0)
        assert objective.penalty().detach() != before


def test_what_goes_on_from_earlier_tasks_is_no_update_until_it_moves(
    minilm, second_task, random_adapter
):
    """Without retention the adapter goes on: the price is that of the change since."""
    learnt = moved(second_task, random_adapter).current
    warm = snapshot_task_start(State(learnt, zero_adapter(learnt.shapes, 1)))
    assert warm.num_reference_directions == 8
    objective, _ = objective_of(minilm, warm, Cache())
    assert float(objective.penalty().detach()) < 1e-4
    layers = {n: LoraFactors(f.A, 1.1 * f.B) for n, f in warm.current.layers.items()}
    objective, _ = objective_of(
        minilm, replace(warm, current=Adapter(layers, warm.current.scaling)), Cache()
    )
    expected, anchors = [], make_anchors(warm.retained, CPU)
    for name, f in warm.current.layers.items():
        change = LoraFactors(torch.eye(f.A.shape[1]), 0.1 * warm.current.scaling * f.B @ f.A)
        expected.append(dense_penalty(change, anchors[name], config(lambda1=100.0)))
    torch.testing.assert_close(
        objective.penalty().detach(), torch.stack(expected).mean(), rtol=1e-2, atol=0
    )
