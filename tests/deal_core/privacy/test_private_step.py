"""A step under the mechanism ``record``: clipping, noise, Poisson samples, guards; of records, and
where a group is the unit."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.deal.objective import Plain
from deal_core.lora.attach import read, set_trainable, write
from deal_core.models import load_model
from deal_core.privacy import dpsgd
from deal_core.privacy.dpsgd import (
    GRID_BITS,
    UnsafeModel,
    clipped_gradients,
    require_plain_lora,
)
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.randomness import seeded
from deal_core.training.loop import run_local_steps
from tests.deal_core.privacy.steps import LABELS, Silence, dealt, gradients, texts
from tests.slow import slow_but

BOTH = frozenset({"lora_A", "lora_B"})
BOUND = 0.05
SIZES = (3, 1, 7, 2, 1, 5)
"""Records of the groups that are there in any case."""
GROUPS = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
"""Of ten examples."""


@pytest.fixture(scope="module", params=slow_but(["encoder", "llama"], "llama"))
def model(request, make_causal, random_adapter, tmp_path_factory):
    """With something in both factors."""
    config = ModelConfig()
    if request.param != "encoder":
        folder = make_causal(tmp_path_factory.mktemp(request.param), request.param)
        config = ModelConfig(family="causal-lm", name=str(folder))
    made = load_model(config, AdapterConfig(), 32, torch.float32)
    write(made.module, random_adapter(read(made.module).shapes, 8, 0.01, seed=5))
    return made


@pytest.fixture
def learning(model):
    """What learns; the model is put back."""
    before = read(model.module)
    yield set_trainable(model.module, BOTH)
    for parameter in model.module.parameters():
        parameter.grad = None
    write(model.module, before)


DATA = texts(3)


def taken(parameters):
    row = torch.cat([p.grad.flatten().double() for p in parameters])
    for p in parameters:
        p.grad = None
    return row


def rows_of(model, data, parameters):
    """Gradients one by one by ordinary differentiation, ``(examples, entries)``."""
    objective, rows = Plain(model, LABELS, data), []
    for i in range(len(data)):
        objective.example_losses([i]).sum().backward()
        rows.append(taken(parameters))
    return torch.stack(rows)


def means_of(rows):
    """Mean gradients of the :data:`GROUPS`."""
    numbers = torch.tensor(GROUPS)
    return torch.stack([rows[numbers == n].mean(dim=0) for n in range(max(GROUPS) + 1)])


def clipped(means, bound):
    return sum(mean * min(1.0, bound / max(float(mean.norm()), 1e-30)) for mean in means)


@pytest.mark.parametrize("trained", [{"lora_B"}, {"lora_A", "lora_B"}])
def test_without_noise_it_is_the_clipped_sum_of_a_loop_over_the_expected_batch(
    model, learning, trained
):
    """Of means of groups; a record that is protected by itself is a group of one."""
    data, parameters = texts(len(GROUPS), "groups"), set_trainable(model.module, frozenset(trained))
    means = means_of(rows_of(model, data, parameters))
    bound = float(means.norm(dim=1).median())  # some are clipped, some are not
    quiet = gradients(data, Silence(), GROUPS, max_grad_norm=bound)
    quiet.accumulate(model.module, Plain(model, LABELS, data), range(len(data)))
    expected = clipped(means, bound) / 4
    assert float((taken(parameters) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("fault", ["nan", "raises", "overflows"])
@pytest.mark.parametrize("bad", [0, 3])
def test_an_example_that_fails_changes_its_own_group_alone(model, learning, fault, bad):
    """It adds nothing, and the mean is over all of its group; the second has a group of its own."""
    data = texts(len(GROUPS), "groups")
    plain = Plain(model, LABELS, data)

    class Stumbling:
        def example_losses(self, batch):
            losses = plain.example_losses(batch)
            if bad not in batch:
                return losses
            if fault == "raises":
                raise RuntimeError("a record that cannot be read")
            if fault == "nan":  # it may take the whole pass along
                return losses * torch.nan
            return losses * torch.tensor([1e38 if i == bad else 1.0 for i in batch])

    rows = rows_of(model, data, learning)
    rows[bad] = 0.0
    quiet = gradients(data, Silence(), GROUPS, max_grad_norm=0.3)
    quiet.accumulate(model.module, Stumbling(), range(len(data)))
    expected = clipped(means_of(rows), 0.3) / 4
    assert float((taken(learning) - expected).norm() / expected.norm()) < 1e-5


def summed(model, source, drawn, scale):
    """What noise is added to, in steps of the grid, before float32 rounds it."""
    parameters, found = set_trainable(model.module, BOTH), []
    plain = Plain(model, LABELS, source.data)

    class Loud:
        def example_losses(self, batch):
            return plain.example_losses(batch) * scale

    def kept(*given):
        found.append(clipped_gradients(*given))
        return found[0]

    with patch.object(dpsgd, "clipped_gradients", kept):
        source.accumulate(model.module, Loud(), source.groups.batch(drawn))
    taken(parameters)
    zeros = torch.zeros(1, dtype=torch.int64)
    return torch.cat([zeros, *(part.flatten() for part in found[0].total.values())])


def square(steps):
    """The exact square of a length."""
    return sum(value * value for value in steps.tolist())


SLOW = [
    pytest.param(size, scale, marks=pytest.mark.slow) for size in (20, 50) for scale in (1e-8, 1e8)
]


@pytest.mark.parametrize(("size", "scale"), [(1, 1.0), (1, 1e8), (20, 1.0), *SLOW])
def test_a_group_moves_the_sum_by_at_most_the_bound_whatever_its_size(model, size, scale):
    """Neighbouring data sets: one has a group more, of 1 (a record), 20 or 50 records. Exact, no
    tolerance."""
    there, changed = dealt(SIZES), {"max_grad_norm": BOUND, "expected_batch": 1}
    others, more = texts(len(there), "others"), texts(size, "the group more")
    small = gradients(others, Silence(), there, **changed)
    own = [*there, *([len(SIZES)] * size)]
    large = gradients([*others, *more], Silence(), own, **changed)
    everybody = range(len(SIZES))
    without = summed(model, small, everybody, scale)
    alone = summed(model, large, [len(SIZES)], scale)
    assert square(alone) <= 4**GRID_BITS
    if scale > 1:
        assert square(alone) > 0.98 * 4**GRID_BITS  # not by clipping all away
    together = summed(model, large, [*everybody, len(SIZES)], scale)
    assert square(together - without) <= 4**GRID_BITS
    assert not summed(model, large, [], scale).any()


def test_fifty_equal_records_move_the_sum_as_one_does(model):
    [record], there, changed = texts(1), dealt(SIZES), {"max_grad_norm": BOUND}
    others = texts(len(there), "others")
    once = gradients([*others, record], Silence(), [*there, 6], **changed)
    often = gradients([*others, *[record] * 50], Silence(), [*there, *[6] * 50], **changed)
    first, many = (summed(model, each, [6], 1.0).double() for each in (once, often))
    assert float((first - many).norm()) <= 1e-4 * float(first.norm())


def test_equal_seeds_draw_equal_groups_whatever_their_sizes():
    """Who is drawn depends on the number of groups alone: not on what is in one."""
    drawn = []
    for groups in (dealt((1,) * 30), dealt((1,) * 29 + (50,))):
        source = gradients(
            texts(len(groups)), SeededNoise(seeded("s")), groups, sample_rate=0.3, steps=3
        )
        drawn.append([{groups[place] for place in batch} for batch in source.batches()])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("groups", "batch", "reason"),
    [
        (None, [1, 1], "twice"),
        (None, [0, 1, 2], "larger than"),
        ([0, 1, 0], [0, 0], "twice"),
        ([0, 1, 0], [0], "in part"),
        ([0, 1, 0], [0, 2, 1], "larger than"),
        ([0, 2, 2], [0], "numbered from 0"),
    ],
)
def test_a_batch_that_is_no_sample_of_the_rate_is_refused(model, learning, groups, batch, reason):
    rare = gradients(DATA, Silence(), groups, sample_rate=1e-9)
    with pytest.raises(UnsafeModel, match=reason):
        rare.accumulate(model.module, Plain(model, LABELS, DATA), batch)


def test_a_group_in_two_pieces_is_not_let_through(model, learning):
    whole = gradients(texts(4), Silence(), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="follow each other"):
        whole.accumulate(model.module, Plain(model, LABELS, whole.data), [0, 1, 2, 3])


def test_the_penalty_comes_after_the_noise_and_is_not_clipped(model, learning):
    seen = []

    class Pulled(Plain):
        def penalty(self):
            factors = require_plain_lora(self.model.module)
            seen.append(all(f.grad is not None for f in factors))
            return 1000 * sum(f.sum() for f in factors)

    source, before = gradients(DATA, Silence(), max_grad_norm=1e-3), read(model.module)
    rate = TrainConfig(learning_rate=1e-3)
    run_local_steps(model, Pulled(model, LABELS, DATA), source, BOTH, rate)
    assert seen == [True]
    for name, factors in read(model.module).layers.items():
        moved = factors.B - before.layers[name].B  # Adam's first step: the sign of 1000
        torch.testing.assert_close(moved, torch.full_like(moved, -1e-3), rtol=1e-3, atol=1e-6)


def test_what_learns_beside_lora_is_refused(model, learning):
    stray = next(p for p in model.module.parameters() if not p.requires_grad and p.dim() == 1)
    stray.requires_grad_(True)
    try:
        with pytest.raises(UnsafeModel, match="no plain LoRA"):
            gradients(DATA, Silence()).accumulate(model.module, Plain(model, LABELS, DATA), [0])
    finally:
        stray.requires_grad_(False)


def test_a_lora_layer_of_another_kind_is_refused(model, learning, monkeypatch):
    layer = next(iter(model.module.adapted_layers.values()))
    monkeypatch.setattr(layer, "forward", lambda x: x)
    with pytest.raises(UnsafeModel, match="no plain LoRA layer"):
        require_plain_lora(model.module)


def test_what_a_loss_reads_of_the_weights_themselves_is_clipped_as_well(model, learning):
    plain = Plain(model, LABELS, DATA)

    class Reads:
        def example_losses(self, batch):
            return plain.example_losses(batch) + 1e6 * learning[0].sum()

    gradients(DATA, Silence()).accumulate(model.module, Reads(), [0, 1])
    assert float(taken(learning).norm()) == pytest.approx(2 * 0.7 / 4, rel=1e-3)


def test_gradients_from_before_are_not_let_through(model, learning):
    learning[0].grad = torch.ones_like(learning[0])
    with pytest.raises(ValueError, match="before those of the batch"):
        gradients(DATA, Silence()).accumulate(model.module, Plain(model, LABELS, DATA), [0])


def test_a_step_that_moves_nothing_is_noticed(model, learning):
    objective, rate = Plain(model, LABELS, DATA), TrainConfig(learning_rate=1e-30)
    with pytest.raises(UnsafeModel, match="changed nothing"):
        run_local_steps(model, objective, gradients(DATA, SecureNoise()), BOTH, rate)
    source = gradients(DATA, SecureNoise())
    report = run_local_steps(model, objective, source, BOTH, TrainConfig())
    assert report.loss == 0.0  # stays unknown


def test_an_adapter_that_is_not_read_back_whole_is_noticed(model, learning, monkeypatch):
    source = gradients(DATA, SecureNoise())
    source.finished(model, LABELS, DATA)
    half = read(model.module)
    layers = {n: replace(f, B=f.B / 2) for n, f in half.layers.items()}
    monkeypatch.setattr(dpsgd.attach, "read", lambda module: replace(half, layers=layers))
    with pytest.raises(UnsafeModel, match="not the model"):
        source.finished(model, LABELS, DATA)
