from __future__ import annotations

import pytest

from simulations.engines.worker_pool import of_those


@pytest.mark.parametrize(
    ("gpus", "shown", "found"),
    [
        (0, None, [{}] * 3),
        (1, None, [{}] * 3),
        (2, None, [{"CUDA_VISIBLE_DEVICES": name} for name in "010"]),
        (2, "3,5", [{"CUDA_VISIBLE_DEVICES": name} for name in "353"]),
        (3, "GPU-a,GPU-b,GPU-c", [{"CUDA_VISIBLE_DEVICES": f"GPU-{name}"} for name in "abc"]),
    ],
)
def test_each_process_is_shown_one_of_those_that_torch_sees(gpus, shown, found) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert [of_those(place, gpus, environment) for place in range(3)] == found
