from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from deal_core.errors import UserError
from simulations.engines.inprocess import FAULTS, run_inprocess, touched
from simulations.run.preflight import preflight


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_keeps_the_shape_and_does_what_its_name_says(kind):
    values = np.array([[1.0, -2.0]], np.float32)
    spoilt = FAULTS[kind](values)
    assert spoilt.shape == values.shape
    expected = {"scaled": 10 * values, "sign-flipped": -values}
    if kind in expected:
        np.testing.assert_array_equal(spoilt, expected[kind])
    else:
        assert np.isnan(spoilt).all()


def test_a_flipped_sign_flips_the_product():
    """Both factors flipped would be the good update again."""
    both, one = ["x.lora_A.weight", "x.lora_B.weight"], ["x.lora_A.weight"]
    assert touched("sign-flipped", both) == ["x.lora_B.weight"]
    assert touched("sign-flipped", one) == one
    assert touched("scaled", both) == both


def test_only_the_inprocess_engine_has_them(make_experiment):
    with pytest.raises(UserError, match="inprocess"):
        preflight(make_experiment("faults.scaled=[0]", "run.engine=flower"))


def run_with(make_experiment, folder, *overrides):
    events: list[dict] = []
    experiment = make_experiment(
        'data.tasks=["surgery"]',
        "data.max_train=40",
        "data.max_test=16",
        "federation.clients=4",
        "federation.rounds=1",
        'data.partition.kind="iid"',
        f'run.out="{folder}"',
        *overrides,
    )
    run_inprocess(experiment, events.append)
    return events, load_file(folder / "adapter" / "adapter_model.safetensors")


def test_nan_is_stopped_by_the_guard_alone(make_experiment, tmp_path):
    events, adapter = run_with(make_experiment, tmp_path, "faults.not-finite=[1, 3]")
    failed = [e for e in events if e["event"] == "client_failed"]
    assert [e["client"] for e in failed] == ["1", "3"]
    assert all("not finite" in e["reason"] for e in failed)
    assert all(np.isfinite(value).all() for value in adapter.values())


def test_who_turns_the_model_around_is_named_and_stays_out_at_the_start_of_the_next_task(
    make_experiment, tmp_path
):
    events, _ = run_with(
        make_experiment,
        tmp_path,
        "faults.sign-flipped=[1]",
        'aggregation.robust="cosine-norm"',
        'data.tasks=["surgery", "laboratory"]',
        "federation.rounds=2",
    )
    left_out = [e["excluded"] for e in events if e["event"] == "round_finished"]
    assert left_out == [[], ["1"], ["1"], ["1"]]


def test_a_robust_step_stays_closer_to_the_clean_model_than_the_mean(make_experiment, tmp_path):
    bad = ("faults.scaled=[0]", 'aggregation.rule="ffa"')
    mean = run_with(make_experiment, tmp_path / "mean", *bad)[1]
    guarded = 'aggregation.robust="cosine-norm"'
    robust = run_with(make_experiment, tmp_path / "robust", *bad, guarded)[1]
    base = run_with(make_experiment, tmp_path / "base", 'aggregation.rule="ffa"')[1]

    def distance(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
        total = 0.0
        for key in one:
            if key.endswith("lora_B.weight"):
                other = key.replace("lora_B", "lora_A")
                total += float(np.square(one[key] @ one[other] - two[key] @ two[other]).sum())
        return total**0.5

    assert distance(robust, base) < distance(mean, base)
