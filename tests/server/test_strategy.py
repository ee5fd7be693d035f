"""What a round makes of an aggregate."""

from __future__ import annotations

import torch

from deal_core.aggregation.rule import Aggregate
from deal_core.lora.adapter import Adapter, relative_difference, stack, zero_adapter
from deal_core.lora.state import State
from server.summation import fold_residual

SHAPES = {"first": (12, 20), "second": (8, 16)}


def test_what_an_exact_rule_finds_no_room_for_is_kept_whole_and_does_not_grow(random_adapter):
    """Twelve rounds of rank 3: 36 directions, where no layer has more than 12."""
    state = State(random_adapter(SHAPES, 4, 2.0, 0), zero_adapter(SHAPES, 6))
    rests: list[Adapter] = []
    for server_round in range(12):
        rests.append(random_adapter(SHAPES, 3, 1.0, 1 + server_round))
        state = fold_residual(state, Aggregate(state.current, rests[-1], error=0.0))
        assert state.residual is not None
        assert state.residual.rank <= 12
        assert relative_difference(state.residual, stack(rests)) < 1e-6
    for name, shape in SHAPES.items():
        factors = state.residual.layers[name]
        assert factors.A.dtype == torch.float32
        assert (factors.B.shape[0], factors.A.shape[1]) == shape
