"""An instruction is read strictly, and its hash covers what all clients of a sum are told."""

import pytest
import torch

from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.wire.instruction import Instruction, read_instruction, transcript_hash

ASKED = Instruction(task="surgery", stage=0, server_round=1, rank=2, retained_rank=2)


def told(value):
    """Hash of a request whose state is zeros but for one value."""
    current, retained = (
        Adapter({"q": LoraFactors(torch.zeros(2, 3), torch.zeros(3, 2))}, 1.0) for _ in "ab"
    )
    current.layers["q"].B[0, 0] = value
    return transcript_hash(ASKED, State(current, retained), own_tasks=False)


def test_the_hash_tells_the_smallest_values_apart_and_not_both_zeros():
    assert len({told(value) for value in (0.0, 1e-30, -1e-30, 1e-9, 1.0)}) == 5
    assert told(-0.0) == told(0.0)


LEAST = {"stage": -1, "server_round": 0, "rank": 1, "retained_rank": 1, "retained_rows": 1}


@pytest.mark.parametrize("field", LEAST)
def test_a_number_has_its_least_value(field):
    sent = ASKED.to_config()
    assert getattr(read_instruction({**sent, field: LEAST[field]}), field) == LEAST[field]
    with pytest.raises(PayloadError, match=field):
        read_instruction({**sent, field: LEAST[field] - 1})
