import os
from dataclasses import replace

import pytest
import torch

from deal_core.errors import UserError
from deal_core.lora.state import State
from server.folder import previous_checkpoint
from server.run import VERSION, Checkpoint, History, load_checkpoint, load_latest, save_checkpoint

SHAPES = {"first": (12, 20), "second": (30, 16)}


@pytest.fixture(params=[None, 2], ids=["plain", "residual"])
def checkpoint(request, random_adapter):
    residual = None if request.param is None else random_adapter(SHAPES, request.param, 1.0, 3)
    history = History(
        evaluations=({"0": [[3, 4, 1], [0, 0, 0]], "1": [[3, 4], [2, 2]]},),
        bytes_up=(1.5,),
        aggregation_error=(0.25,),
        seconds={"train": 1.25},
        distrusted=("0",),
    )
    state = State(
        random_adapter(SHAPES, 3, 2.0 / 3.0, 1),
        random_adapter(SHAPES, 5, 1.0, 2),
        residual,
        2,
        heads={"eye / ear": torch.arange(6.0).view(2, 3)},
        sums={"gram": torch.tensor([0.1, 1e-300], dtype=torch.float64), "n/eye": torch.ones(1)},
    )
    return Checkpoint(position=4, state=state, history=history)


def test_round_trip_to_the_last_bit(tmp_path, checkpoint):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    back = load_checkpoint(path, SHAPES)
    assert back.position == 4
    assert back.history == checkpoint.history
    assert back.state.num_reference_directions == 2
    assert len(back.state.parts()) == len(checkpoint.state.parts())
    for one, two in zip(back.state.parts(), checkpoint.state.parts(), strict=True):
        assert one.scaling == two.scaling
        for name in SHAPES:
            assert torch.equal(one.layers[name].A, two.layers[name].A)
            assert torch.equal(one.layers[name].B, two.layers[name].B)
    for kept in ("heads", "sums"):
        found, expected = getattr(back.state, kept), getattr(checkpoint.state, kept)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)


def test_a_checkpoint_that_counts_in_another_schedule_is_refused_with_the_cure(
    tmp_path, checkpoint, monkeypatch
):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    monkeypatch.setattr("server.run.VERSION", VERSION + 1)
    with pytest.raises(UserError, match=r"another release .*begin the run anew"):
        load_checkpoint(path, SHAPES)


def test_a_verdict_stands_until_the_next_one():
    history = History(distrusted=("a", "b"))
    assert history.judged(["c"], []).distrusted == ("a", "b")
    assert history.judged(["a", "b", "c"], ["b"]).distrusted == ("b",)
    assert history.judged(["a", "c"], ["c"]).distrusted == ("b", "c")


def test_a_kill_while_writing_leaves_the_old_one(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, replace(checkpoint, position=9))
    assert load_checkpoint(path, SHAPES).position == 4


@pytest.mark.parametrize("damage", ["truncated", "text", "other model", "nan", "missing"])
def test_damage_is_named_in_one_line(tmp_path, checkpoint, damage):
    path = tmp_path / "checkpoint.safetensors"
    shapes = dict(SHAPES)
    if damage == "nan":
        checkpoint.state.current.layers["first"].A[0, 0] = float("nan")
    if damage != "missing":
        save_checkpoint(path, checkpoint)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    if damage == "text":
        path.write_text("not a checkpoint")
    if damage == "other model":
        shapes["third"] = (4, 4)
    with pytest.raises(UserError) as fault:
        load_checkpoint(path, shapes)
    assert str(path) in str(fault.value)
    cure = "without --resume" if damage == "missing" else "in another folder"
    assert cure in str(fault.value)
    assert "\n" not in str(fault.value)


def spoilt(path):
    """One bit in the middle of a tensor: every number is still finite."""
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(bytes(data))


def test_one_wrong_bit_is_found_and_the_checkpoint_before_it_is_used(tmp_path, checkpoint):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    save_checkpoint(path, replace(checkpoint, position=5))
    last, reason = load_latest(path, SHAPES)
    assert (last.position, reason) == (5, "")
    spoilt(path)
    back, reason = load_latest(path, SHAPES)
    assert back.position == 4
    assert "damaged checkpoint (its content is not what was written)" in reason
    assert load_latest(path, SHAPES)[1] == ""  # the good one has taken its place
    save_checkpoint(path, replace(checkpoint, position=6))
    for each in (path, previous_checkpoint(path)):
        spoilt(each)
    with pytest.raises(UserError, match="damaged"):
        load_latest(path, SHAPES)


def test_a_full_disk_is_one_line_and_leaves_the_good_checkpoint(tmp_path, checkpoint):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, checkpoint)
    save_checkpoint(path, replace(checkpoint, position=5))
    spoilt(path)
    load_latest(path, SHAPES)
    path.with_name(f"{path.name}.{os.getpid()}.writing").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device.*stands: make room.*--resume"):
        save_checkpoint(path, replace(checkpoint, position=6))
    assert load_latest(path, SHAPES)[0].position == 4
