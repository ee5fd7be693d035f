"""Rules and wire formats in whole runs: bytes as sent, exactness as measured, resume."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from deal_core.errors import UserError
from deal_core.models import adapter_shapes
from server.checkpoint import load_checkpoint
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from simulations.run.preflight import check_names, preflight
from tests.simulations.run.secure_runs import POOLED
from tests.simulations.runs import gain
from tests.sizes import ENOUGH_TO_LEARN, TWO_LAYERS

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def run_with(make_experiment, tmp_path):
    def run(*overrides, name="run", listener=lambda event: None):
        folder = tmp_path / name
        experiment = make_experiment(f'run.out="{folder}"', TWO_LAYERS, *overrides)
        run_inprocess(experiment, listener)
        return experiment, folder

    return run


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


LAYERS, WIDTH, RANK, RETAINED = 2, 384, 8, 64


@pytest.mark.slow
def test_bytes_of_the_exact_pair_and_of_one_factor_in_int8(run_with):
    _, exact = run_with("aggregation.rule=fedit", name="exact")
    _, small = run_with("aggregation.rule=ffa", "wire.dtype=int8", name="small")
    wide, narrow = read_results(exact).wire, read_results(small).wire
    header = 128  # numpy's own, one for each array
    factor = WIDTH * RANK
    assert wide.bytes_up == [LAYERS * 2 * (4 * factor + header)] * 4
    assert narrow.bytes_up == [LAYERS * (factor + 4 * RANK + 2 * header)] * 4
    row = LAYERS * 2 * (4 * WIDTH + header)  # nothing is retained yet: once, one row of zeros
    current = LAYERS * 2 * (4 * factor + header)
    assert wide.bytes_down == [current + row, *[current] * 3]
    retained = LAYERS * 2 * (4 * WIDTH * 2 * RANK + header)  # two tasks
    assert wide.evaluation_bytes_down[0] == row
    assert wide.evaluation_bytes_down[-1] == row + retained
    spent = sum(narrow.bytes_up) + narrow.received
    assert spent < 0.35 * (sum(wide.bytes_up) + wide.received)


@pytest.mark.slow
def test_bytes_of_sums_in_int8_and_answers_that_are_nearly_the_same(run_with):
    """One round of class sums after two of learning, in each of two tasks of four labels."""
    on = ("method.prototype.enabled=on", *ENOUGH_TO_LEARN)
    _, exact = run_with(*on, name="exact")
    _, small = run_with("wire.dtype=int8", *on, name="small")
    wide, narrow = read_results(exact), read_results(small)
    header, labels, size = 128, 4, 2 * WIDTH  # of four layers
    beside = size * (size - 1) // 2
    whole = 3 * header + 4 * (labels + labels * size + beside + size)
    coded = 6 * header + 4 * (2 * labels + 2 * size) + labels * size + beside
    assert wide.wire.bytes_up[2::3] == [whole] * 2
    assert narrow.wire.bytes_up[2::3] == [coded] * 2
    assert coded < 0.26 * whole
    for exactly, coarsely in (
        (wide.average_accuracy, narrow.average_accuracy),
        (wide.class_incremental.average_accuracy, narrow.class_incremental.average_accuracy),
    ):
        assert abs(exactly - coarsely) < 0.06  # of 128 answers
    assert steps_off(small) < 1e-3 < 0.1 < steps_off(exact)  # what was judged is what is kept


def steps_off(run):
    """How far weights of the run's heads are from whole steps of their row's largest / 127."""
    heads = load_file(run / "adapter" / "heads.safetensors").values()
    rows = np.concatenate([head[..., :-1].reshape(-1, head.shape[-1] - 1) for head in heads])
    steps = rows / (np.abs(rows).max(axis=1, keepdims=True) / 127)
    return np.abs(steps - steps.round()).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lossy_format_keeps_server_and_clients_together(run_with, dtype):
    """Server and clients go on from the same numbers, so exact rules stay exact."""
    _, folder = run_with("aggregation.rule=fedex", f"wire.dtype={dtype}", *ENOUGH_TO_LEARN)
    results = read_results(folder)
    assert max(results.aggregation_error) < 1e-5
    assert gain(results) > 0


def test_resume_finds_the_error_feedback_again(run_with):
    """With ffa the basis stays, so what int8 lost in one round is made good in the next."""
    settings = ("aggregation.rule=ffa", "wire.dtype=int8", "federation.rounds=3")
    _, whole = run_with(*settings, name="whole")
    seen = 0

    def interrupt(event):
        nonlocal seen
        seen += event["event"] == "client_finished"
        if seen == 5 and event["event"] == "client_finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with(*settings, name="parts", listener=interrupt)
    _, parts = run_with(*settings, "run.resume=true", name="parts")
    one, two = adapter_of(whole), adapter_of(parts)
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_fedex_is_exact_and_the_model_does_not_grow(run_with):
    """The residual lives within a task, and is compressed at its end."""
    experiment, folder = run_with("aggregation.rule=fedex", *ENOUGH_TO_LEARN)
    results = read_results(folder)
    assert max(results.aggregation_error) < 1e-5
    # the second round of a task carries the residual of the first, the first carries none
    down = results.wire.bytes_down
    assert down[1] > down[2]
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = load_checkpoint(folder / "checkpoint.safetensors", shapes).state
    assert state.retained.rank == RETAINED
    assert state.residual is None


def test_fedit_is_not_exact_and_says_so(run_with):
    _, folder = run_with("aggregation.rule=fedit", 'data.partition.kind="iid"')
    assert max(read_results(folder).aggregation_error) > 1e-3


def test_clients_of_their_own_ranks(run_with):
    ranks = (8, 4, 2)
    settings = ("aggregation.rule=flora", "federation.clients=3", *ENOUGH_TO_LEARN)
    _, folder = run_with(*settings, f"adapter.client_ranks={[*ranks]}")
    results = read_results(folder)
    assert max(results.aggregation_error) < 1e-5
    per_rank = [LAYERS * 2 * (4 * WIDTH * rank + 128) for rank in ranks]
    assert results.wire.bytes_up == [sum(per_rank) / 3] * len(results.wire.bytes_up)
    assert gain(results) > 0


def test_ranks_that_cannot_be_are_refused_before_anything_starts(make_experiment):
    with pytest.raises(UserError, match="cannot mix ranks"):
        preflight(make_experiment("adapter.client_ranks=[2, 8]"))
    with pytest.raises(UserError, match="from 1 to"):
        preflight(make_experiment("adapter.client_ranks=[16]", "aggregation.rule=flora"))


def test_an_unknown_encoding_is_refused_before_anything_starts(make_experiment):
    with pytest.raises(UserError, match=r"wire\.dtype"):
        preflight(make_experiment("wire.dtype=int4"))


def test_the_rule_of_a_kind_of_adapter_goes_with_no_other(make_experiment):
    """Rules that a kind brings along learn nothing elsewhere: lora_B begins at zero."""
    with pytest.raises(UserError, match=r"'ffa-a' learns nothing with adapter\.kind 'lora'"):
        check_names(make_experiment("aggregation.rule=ffa-a"))
    with pytest.raises(UserError, match=r"'flora': adapter\.kind 'pooled' has a rule of its own"):
        check_names(make_experiment(*POOLED, "aggregation.rule=flora"))
    check_names(make_experiment(*POOLED, "aggregation.rule=ffa-a"))
