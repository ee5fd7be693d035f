"""Separate institutions on one machine: real processes, TLS, keys, three data formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deal_core.experiment_file import apply_overrides, parse_experiment, read_toml
from server.results import read_results
from simulations.inprocess import run_inprocess
from tests.simulations.deployment.loopback import SITES, divide, experiment_file, federation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_three_sites_learn_what_one_process_learns(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data)
    path = experiment_file(tmp_path / "two-tasks.toml")
    with federation(tmp_path) as fed:
        for site in SITES:
            fed.add(site, data / site)
            fed.start_site(site)
        run = fed.submit(str(path))
        fed.wait_event(run, "run_finished", 500)
        deployed = fed.run(run)
    alone = tmp_path / "alone"
    alone.mkdir()
    overrides = [
        "data.source=files",
        f'data.path="{data / "all"}"',
        "data.partition.kind=column",
        "data.partition.column=site",
        f"federation.clients={len(SITES)}",
        f'run.out="{alone}"',
        "run.workers=1",
    ]
    tables = apply_overrides(read_toml(path), overrides)
    run_inprocess(parse_experiment(tables, "test"), lambda event: None)
    there, here = read_results(deployed), read_results(alone)
    assert there.engine == "deployment"
    assert there.accuracy_matrix == here.accuracy_matrix
    assert there.zero_shot == here.zero_shot
    adapters = [
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (deployed, alone)
    ]
    assert adapters[0].keys() == adapters[1].keys() != set()
    for key, value in adapters[0].items():
        np.testing.assert_allclose(value, adapters[1][key], atol=1e-4)
