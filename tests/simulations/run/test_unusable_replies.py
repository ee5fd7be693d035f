"""A client whose reply is no use has given none."""

from __future__ import annotations

import pytest

from deal_core.errors import UserError
from tests.simulations.runs import at, no_number, run_in_process
from tests.sizes import TWO_LAYERS

pytestmark = pytest.mark.usefixtures("one_model")
SMALL = ("federation.clients=3", "federation.rounds=4", "train.batch_size=8", TWO_LAYERS)


def test_too_few_usable_replies_end_a_run(make_experiment, tmp_path) -> None:
    alone = make_experiment(*SMALL, "federation.quorum=1.0", 'data.tasks=["laboratory"]')
    with pytest.raises(UserError, match="2 of 3 clients gave a valid reply"):
        run_in_process(at(alone, tmp_path), no_number)
