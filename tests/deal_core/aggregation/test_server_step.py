"""Steps at the server are those of torch's optimiser, and a task leaves nothing to the next."""

from __future__ import annotations

import torch

from deal_core.aggregation.server_step import begin_steps, momentum_step
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.payload import PREFIX
from deal_core.lora.state import State

KEY = f"{PREFIX}layer.lora_A.weight"


def start() -> State:
    adapter = zero_adapter({"layer": (5, 7)}, 3)
    return State(adapter, zero_adapter({"layer": (5, 7)}, 2), sums={"other": torch.ones(2)})


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(steps)]


def test_momentum_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(3, 7, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    state = start()
    for gradient in gradients(5):
        parameter.grad = gradient.clone()
        optimizer.step()
        state = momentum_step(state, {KEY: gradient}, 0.1, 0.9)
    assert torch.allclose(state.current.layers["layer"].A.double(), parameter, atol=1e-6)
    assert not state.current.layers["layer"].B.any()


def test_a_task_begins_without_memory_of_the_one_before():
    state = momentum_step(start(), {KEY: gradients(1)[0]}, 0.1, 0.5)
    assert set(begin_steps(state).sums) == {"other"}
