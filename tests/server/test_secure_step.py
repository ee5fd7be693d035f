"""What a round without a sum does to the state: nothing, but for where a task begins and ends."""

from __future__ import annotations

import torch

from deal_core.aggregation import make_rule
from deal_core.aggregation.server_step import COUNT, begin_steps, mean_of_steps, momentum_step
from deal_core.config.experiment import AggregationConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PREFIX
from deal_core.lora.state import State
from server.schedule import Step
from server.secure_step import GradientStep, MeanUpdate

KEY = f"{PREFIX}layer.lora_A.weight"


def stepped(rounds: int) -> State:
    """A state after some steps, each of whose iterates is kept."""
    factors = LoraFactors(torch.zeros(2, 3), torch.ones(3, 2))
    adapter = Adapter({"layer": factors}, 1.0)
    state = State(adapter, adapter)
    for number in range(rounds):
        gradient = {KEY: torch.full((2, 3), float(number + 1), dtype=torch.float64)}
        state = momentum_step(state, gradient, 0.1, 0.9, keep=True)
    return state


def test_a_lost_round_in_the_middle_leaves_the_state_as_it_was(make_experiment):
    state = stepped(2)
    step = GradientStep(make_experiment("federation.rounds=4"), tasks=1)
    assert step.without_sum(state, Step("round", 0, 3)) is state
    mean = MeanUpdate(make_rule(AggregationConfig()))
    assert mean.without_sum(state, Step("round", 0, 4)) is state


def test_a_lost_last_round_still_ends_with_the_mean_of_iterates(make_experiment):
    state = stepped(3)
    step = GradientStep(make_experiment("federation.rounds=4"), tasks=1)
    after = step.without_sum(state, Step("round", 0, 4)).current.layers["layer"].A
    assert torch.equal(after, mean_of_steps(state).current.layers["layer"].A)
    assert not torch.equal(after, state.current.layers["layer"].A)


def test_a_lost_first_round_does_not_keep_the_velocity_of_the_task_before(make_experiment):
    state = stepped(3)
    step = GradientStep(make_experiment("federation.rounds=4"), tasks=2)
    after = step.without_sum(state, Step("round", 1, 1))
    assert state.sums[COUNT] == 3
    assert after.sums == begin_steps(state).sums == {}
