from __future__ import annotations

import pytest

from deal_core.config.experiment import Experiment, FederationConfig, RunConfig
from simulations.engines.worker_pool import Workers, divide, shown_gpu


def asked(clients: int = 100, threads: int = 0, workers: int = 0) -> Experiment:
    return Experiment(
        federation=FederationConfig(clients=clients),
        run=RunConfig(threads=threads, workers=workers),
    )


@pytest.mark.parametrize(
    ("experiment", "cores", "gpus", "expected"),
    [
        (asked(), 8, 0, Workers(8, 1, 0.0)),
        (asked(clients=2), 8, 0, Workers(2, 4, 0.0)),
        (asked(threads=2), 8, 0, Workers(4, 2, 0.0)),
        (asked(threads=16), 8, 0, Workers(1, 16, 0.0)),
        (asked(workers=3), 8, 0, Workers(3, 2, 0.0)),
        (asked(workers=3, threads=1), 8, 0, Workers(3, 1, 0.0)),
        (asked(workers=4), 2, 0, Workers(4, 1, 0.0)),
        (asked(), 16, 2, Workers(2, 8, 1.0)),
        (asked(workers=1), 16, 2, Workers(1, 16, 1.0)),
        (asked(workers=4), 16, 1, Workers(4, 4, 0.25)),
        (asked(workers=3), 16, 1, Workers(3, 5, 0.3333)),
    ],
)
def test_cores_and_gpus_are_divided(
    experiment: Experiment, cores: int, gpus: int, expected: Workers
) -> None:
    assert divide(experiment, cores, gpus) == expected


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_as_many_actors_fit_as_there_are_workers(gpus: int) -> None:
    """Flower's arithmetic (``pool_size_from_resources``), and no GPU is promised twice."""
    for workers in range(1, 60):
        divided = divide(asked(workers=workers), 16, gpus)
        cpus = divided.count * divided.threads
        actors = min(int(cpus / divided.threads), int(gpus / divided.gpus))
        assert actors == divided.count == workers
        assert 0 < divided.gpus <= 1
        assert divided.count * divided.gpus <= gpus


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
def test_each_process_is_shown_one_shown_gpu_that_torch_sees(gpus, shown, found) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert [shown_gpu(place, gpus, environment) for place in range(3)] == found
