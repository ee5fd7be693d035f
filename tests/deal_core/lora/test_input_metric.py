"""What is kept when updates are cut by what layers take in: against the singular value
decomposition of the whole matrices."""

from __future__ import annotations

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.config.method import MethodConfig
from deal_core.lora.adapter import Adapter, LoraFactors, zero_adapter
from deal_core.lora.attach import read
from deal_core.lora.input_metric import EVENNESS, input_metric
from deal_core.lora.state import State
from deal_core.methods.deal.method import make_deal
from deal_core.models import load_model
from deal_core.training.public_inputs import public_inputs

RANK, CUT = 6, 3
TASKS = [(("Pathology", "Surgery"), ""), (("Heart_and_lung", "Eye"), "")]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(adapter: Adapter) -> torch.Tensor:
    factors = adapter.layers["layer"]
    return adapter.scaling * (factors.B.double() @ factors.A.double())


@pytest.fixture
def moments() -> torch.Tensor:
    """Some directions count a hundred times as much as others."""
    inputs = draw(40, 10, seed=5) * torch.linspace(0.1, 3.0, 10).double()
    return inputs.T @ inputs


@pytest.fixture
def state() -> State:
    current = LoraFactors(draw(RANK, 10, seed=1).float(), draw(12, RANK, seed=2).float())
    retained = LoraFactors(draw(CUT, 10, seed=3).float(), draw(12, CUT, seed=4).float())
    return State(Adapter({"layer": current}, 2.0), Adapter({"layer": retained}))


def ended(state: State, moments: torch.Tensor, retained_rank: int) -> State:
    adapter = AdapterConfig(rank=RANK, retained_rank=retained_rank)
    method = make_deal(MethodConfig(), adapter)
    metric = input_metric({"layer": moments})
    return metric.shrunk(method.end_task(metric.stretched(state)))


def test_the_best_part_in_the_metric_is_kept(state, moments):
    """Eckart and Young, of ``dW C^(1/2)``."""
    everything = update(state.current) + update(state.retained)
    even = moments / moments.diagonal().mean() + EVENNESS * torch.eye(10).double()
    values, vectors = torch.linalg.eigh(even / (1 + EVENNESS))
    root = vectors * values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(everything @ root)
    best = (u[:, :CUT] * s[:CUT]) @ vh[:CUT] @ torch.linalg.inv(root)
    kept = update(ended(state, moments, CUT).retained)
    assert torch.allclose(kept, best, atol=1e-5)
    lost = torch.linalg.norm((everything - kept) @ root)
    plain = make_deal(MethodConfig(), AdapterConfig(rank=RANK, retained_rank=CUT)).end_task(state)
    assert lost < 0.999 * torch.linalg.norm((everything - update(plain.retained)) @ root)
    assert torch.allclose(lost.square(), s[CUT:].square().sum(), rtol=1e-5)


def test_nothing_is_lost_where_everything_fits(state, moments):
    everything = update(state.current) + update(state.retained)
    kept = ended(state, moments, RANK + CUT)
    assert torch.allclose(update(kept.retained), everything, atol=1e-5)
    assert not update(kept.current).any()


def test_what_is_kept_is_in_order_and_balanced(state, moments):
    factors = ended(state, moments, CUT).retained.layers["layer"]
    gram = factors.A @ factors.A.T
    assert torch.allclose(gram, factors.B.T @ factors.B, atol=1e-4)
    assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-4)
    assert gram.diagonal().tolist() == sorted(gram.diagonal().tolist(), reverse=True)


def test_a_layer_that_saw_nothing_is_cut_plainly(state):
    kept = ended(state, torch.zeros(10, 10), CUT)
    plain = make_deal(MethodConfig(), AdapterConfig(rank=RANK, retained_rank=CUT)).end_task(state)
    assert torch.allclose(update(kept.retained), update(plain.retained), atol=1e-5)


def test_public_inputs_are_what_the_first_layer_takes_in():
    """The first layer's inputs are the outputs of the embeddings before it."""
    adapter = AdapterConfig(rank=2, target_modules=("0.attention.self.query", "5.output.dense"))
    model = load_model(ModelConfig(), adapter, 16)
    nothing = zero_adapter(read(model.module).shapes, 2)
    seen: list[torch.Tensor] = []
    embeddings = next(m for n, m in model.module.named_modules() if n.endswith(".embeddings"))
    handle = embeddings.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    try:
        found = public_inputs(model, State(nothing, nothing), TASKS)
    finally:
        handle.remove()
    assert set(found) == set(nothing.layers)
    # The last passes, a text each: before them the names' own vectors are made, by the frozen
    # model, whose inputs are none of what is adapted.
    names = sum(len(labels) for labels, _ in TASKS)
    rows = torch.cat([each.reshape(-1, each.shape[-1]) for each in seen[-names:]]).double()
    first = next(value for name, value in found.items() if ".0." in name)
    assert torch.allclose(first, rows.T @ rows, rtol=1e-6)
    assert len(rows) > names
    again = public_inputs(model, State(nothing, nothing), TASKS)  # all vectors are there
    assert all(torch.equal(again[name], value) for name, value in found.items())
