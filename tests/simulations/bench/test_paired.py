from __future__ import annotations

import pytest
import torch

from simulations.bench.limit import operations_per_example, product_work
from simulations.bench.paired import Contestant, Timed, ratios, timed_in_turn


@pytest.mark.slow
def test_each_contestant_has_its_own_process_and_turn():
    done = timed_in_turn(
        [Contestant(name, product_work, ("float32",)) for name in ("one", "two")], windows=2
    )
    assert list(done) == ["one", "two"]
    for timed in done.values():
        assert len(timed.windows) == 2
        assert timed.rate > 1e8  # a processor that multiplies
        assert timed.peak_bytes is None or timed.peak_bytes > 50e6
    assert len(ratios(done["one"], done["two"])) == 2


def test_ratios_are_taken_pair_by_pair():
    first = Timed("a", ({"work": 4, "seconds": 1}, {"work": 4, "seconds": 4}), None, {})
    second = Timed("b", ({"work": 2, "seconds": 1}, {"work": 1, "seconds": 4}), None, {})
    assert ratios(first, second) == [2.0, 4.0]
    assert ratios(first, first) == [1.0, 1.0]
    assert first.rate == 2.5


@pytest.mark.slow
def test_a_contestant_that_fails_is_named_with_its_error():
    with pytest.raises(RuntimeError, match=r"benchmark 'bad'.*float33"):
        timed_in_turn([Contestant("bad", product_work, ("float33",))], windows=1)


def test_the_trainers_model_is_the_one_that_deal_trains(minilm):
    """Equal logits and equal loss: the benchmark compares speed, not models."""
    from deal_core.lora.adapter import zero_adapter
    from deal_core.lora.attach import read
    from deal_core.lora.state import State
    from deal_core.models.interface import Encoded
    from deal_core.training.loop import load_state
    from simulations.bench.step_trainer import LabelEncoder
    from simulations.bench.workloads import Workload, texts

    loaded = texts(Workload(24, 4, 4))
    shapes = read(minilm.module).shapes
    load_state(minilm, State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)))
    batch = [Encoded(*example) for example in loaded.train]
    theirs = LabelEncoder(loaded.labels)
    ids = torch.tensor([tokens for tokens, _ in loaded.train])
    targets = torch.tensor([target for _, target in loaded.train])
    assert ids.shape == (4, 24)
    with torch.no_grad():
        ours = minilm.forward_train(batch, loaded.labels, ())
        out = theirs(ids, torch.ones_like(ids), targets)
    torch.testing.assert_close(
        out["logits"], minilm.scores(batch, loaded.labels).detach(), rtol=0, atol=1e-4
    )
    assert float(out["loss"]) == pytest.approx(float(ours.example_losses.mean()), abs=1e-4)
    learning = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert learning == sum(8 * (d_in + d_out) for d_out, d_in in shapes.values())


def test_counted_operations_are_those_of_the_layers():
    """Per token and linear weight: two operations forward, two for the gradient of the input,
    which the first layer's query, key and value do not need; attention grows with the length."""
    width, inner, layers, tokens = 384, 1536, 6, 32
    dense = 4 * width * width + 2 * width * inner
    forward = 2 * tokens * dense * layers
    backward = forward - 2 * tokens * 3 * width * width
    attention = 6 * 2 * tokens * tokens * width * layers  # two products forward, four back
    counted = operations_per_example(tokens, 2)
    assert counted == pytest.approx(forward + backward + attention, rel=0.05)
