from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from deal_core.config.experiment import AdapterConfig, MethodConfig, TrainConfig
from deal_core.data import Example
from deal_core.deal.interface import LocalTask, TaskDataset, TaskHistory, statistics_of
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, stack, zero_adapter
from deal_core.lora.attach import read
from deal_core.lora.state import State
from deal_core.methods import METHODS, make_method
from deal_core.randomness import seeded
from deal_core.training.loop import (
    NonPrivateGradients,
    load_state,
    run_local_steps,
)

FACTORS = ("lora_A", "lora_B")
SHAPES = {"first": (40, 50), "second": (60, 40)}
CONFIG = AdapterConfig(rank=4, retained_rank=6, lora_alpha=8.0)


def learnt(state, seed):
    """Pretend that a task taught something: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        n: LoraFactors(f.A, torch.randn(f.B.shape, generator=generator))
        for n, f in state.current.layers.items()
    }
    return replace(state, current=Adapter(layers, state.current.scaling))


def start():
    return State(zero_adapter(SHAPES, 4, 2.0), zero_adapter(SHAPES, 6))


def start_drawn(method):
    return method.begin_task(start(), seeded(0))


def deal(**keys):
    return MethodConfig.model_validate(keys)


ONE_ADAPTER = deal(retention={"filter": "none"})
TRAINED = [
    name for name in METHODS if statistics_of(make_method(MethodConfig(name=name), CONFIG)) is None
]
"""Methods that train an adapter; the others: test_class_means.py, test_linear_probe.py."""
SWITCHED = {
    **{name: MethodConfig(name=name) for name in TRAINED},
    "wavelet": deal(retention={"filter": "wavelet"}),
    "one adapter": ONE_ADAPTER,
}


@pytest.mark.parametrize("switches", SWITCHED.values(), ids=SWITCHED)
def test_every_method_keeps_ranks_and_scaling_over_many_tasks(switches):
    method = make_method(switches, CONFIG)
    state = start()
    for task in range(4):
        state = method.begin_task(state, seeded(0, task))
        assert state.current.rank == 4
        assert state.current.scaling == 2.0
        state = method.end_task(learnt(state, task))
        grown = 4 * (task + 1)  # olora keeps all adapters, as published
        kept = {"olora": grown, "deal": 6 if switches.retention.filter != "none" else 1}
        assert state.retained.rank == kept.get(switches.name, 1)
        assert state.residual is None


HOLDS = [name for name in SWITCHED if name not in ("deal-reference", "slao")]
"""A task begins with the model as it was: not where drawn maps replace it, or where it goes on from
factors that were not merged, as published."""


@pytest.mark.parametrize("switches", [SWITCHED[name] for name in HOLDS], ids=HOLDS)
def test_a_task_in_which_nothing_was_learnt_changes_nothing(switches):
    method = make_method(switches, CONFIG)
    state = method.end_task(learnt(method.begin_task(start(), seeded(0)), 1))
    whole = stack(state.parts())
    after = method.end_task(method.begin_task(state, seeded(1)))
    assert relative_difference(stack(after.parts()), whole) < 1e-6


def test_deal_retains_exactly_while_it_fits():
    """Rank 4 fits into 6; with a second task of rank 4 the best 6 of 8 are kept."""
    method = make_method(deal(), CONFIG)
    one = learnt(method.begin_task(start(), seeded(0)), 1)
    kept = method.end_task(one)
    assert relative_difference(kept.retained, one.current) < 1e-6
    two = learnt(method.begin_task(kept, seeded(1)), 2)
    whole = stack([two.retained, two.current])
    best = method.end_task(two).retained
    assert 0.0 < relative_difference(best, whole) < 1.0


def test_a_fresh_adapter_starts_outside_of_what_is_retained():
    method = make_method(deal(), CONFIG)
    state = method.end_task(learnt(method.begin_task(start(), seeded(0)), 1))
    fresh = method.begin_task(state, seeded(1)).current
    for name, f in fresh.layers.items():
        assert (f.A.double() @ state.retained.layers[name].A.double().T).abs().max() < 1e-5
        assert not f.B.any()


def test_deal_consolidates_the_residual_too():
    method = make_method(MethodConfig(), CONFIG)
    state = learnt(method.begin_task(start(), seeded(0)), 1)
    residual = learnt(method.begin_task(start(), seeded(2)), 3).current
    with_rest = State(state.current, state.retained, residual)
    wide = make_method(MethodConfig(), AdapterConfig(rank=4, retained_rank=8, lora_alpha=8.0))
    merged = wide.end_task(with_rest).retained
    assert relative_difference(merged, stack([state.current, residual])) < 1e-5


def test_the_retention_reaches_what_is_retained():
    narrow = CONFIG.model_copy(update={"retained_rank": 4})
    method = make_method(MethodConfig(), narrow)
    two = learnt(method.begin_task(method.end_task(learnt(start_drawn(method), 1)), seeded(1)), 2)
    keys = ({"filter": "svd"}, {"filter": "wavelet"})
    kept = [make_method(deal(retention=k), narrow).end_task(two).retained for k in keys]
    assert 0.01 < relative_difference(kept[1], kept[0]) < 0.9


def test_without_retention_clients_see_where_the_task_started():
    """``base + retained`` is that model; all parts together are the one adapter, however far it
    has moved."""
    method = make_method(ONE_ADAPTER, CONFIG)
    first = method.end_task(learnt(start_drawn(method), 1))
    begun = method.begin_task(first, seeded(1))
    assert relative_difference(begun.retained, first.current) < 1e-6
    for state in (begun, learnt(begun, 2)):
        assert relative_difference(stack(state.parts()), state.current) < 1e-6


def test_without_retention_what_a_rule_puts_beside_the_adapter_is_kept():
    """Nothing is compressed."""
    method = make_method(ONE_ADAPTER, CONFIG)
    for begun in (
        start_drawn(method),
        method.begin_task(method.end_task(learnt(start_drawn(method), 1)), seeded(1)),
    ):
        beside = learnt(method.begin_task(start(), seeded(2)), 3).current
        ended = method.end_task(replace(begun, residual=beside))
        assert ended.current is begun.current
        assert relative_difference(ended.residual, beside) < 1e-6
        again = method.begin_task(ended, seeded(3))
        assert relative_difference(again.retained, stack([begun.current, beside])) < 1e-6
        assert relative_difference(stack(again.parts()), again.retained) < 1e-6


def test_unknown_method_names_the_known_ones():
    with pytest.raises(UserError, match=r"known: .*deal.*did you mean 'deal'"):
        make_method(MethodConfig(name="deall"), CONFIG)


LABELS = ("Anatomy", "Surgery")
DATA = [
    Example("The phrenic nerve supplies the diaphragm", "Anatomy"),
    Example("Laparoscopic removal of the appendix", "Surgery"),
]


class NothingKept:
    def get_or_compute(self, tasks, basis, make):
        return make(0, {})


OLD_LABELS = ("Dental", "Skin")
OLD = [
    Example("Caries of the lower molar", "Dental"),
    Example("A scaly plaque on the elbow", "Skin"),
]


def second_task(minilm, shapes, name):
    """A client in the second task; the model holds what the first one taught."""
    built = make_method(MethodConfig(name=name), AdapterConfig())
    state = built.begin_task(
        State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16)), seeded(0)
    )
    small = {n: LoraFactors(f.A, f.B / 100) for n, f in learnt(state, 1).current.layers.items()}
    is_nonzero = replace(state, current=Adapter(small, 2.0))
    state = built.begin_task(built.end_task(is_nonzero), seeded(1))
    load_state(minilm, state)
    share = TaskDataset(OLD_LABELS, minilm.encode(OLD, OLD_LABELS))
    data = minilm.encode(DATA, LABELS)
    past = TaskHistory([lambda: share], NothingKept(), 1)
    return built.objective(LocalTask(minilm, state, data, LABELS, (OLD_LABELS,), past)), data


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        *((name, FACTORS) for name in TRAINED),
        *(("deal-reference", (one,)) for one in FACTORS),
    ],
)
def test_equal_seeds_give_equal_updates_of_the_factors_that_learn(minilm, shapes, name, trained):
    """From losses that are independent of batch-mates."""
    after = []
    for _ in range(2):
        objective, data = second_task(minilm, shapes, name)
        before = read(minilm.module)
        with torch.no_grad():
            together = objective.example_losses(range(len(data)))
            alone = torch.cat([objective.example_losses([i]) for i in range(len(data))])
        assert together.shape == (len(data),)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        gradients = NonPrivateGradients(data, 2, TrainConfig(), seeded(0))
        report = run_local_steps(minilm, objective, gradients, frozenset(trained), TrainConfig())
        after.append(read(minilm.module))
        assert report.steps == 2
    for layer, f in after[0].layers.items():
        start, again = before.layers[layer], after[1].layers[layer]
        assert torch.equal(f.A, again.A)
        assert torch.equal(f.B, again.B)
        if "lora_A" not in trained:
            assert torch.equal(f.A, start.A)
        if "lora_B" not in trained:
            assert torch.equal(f.B, start.B)


SPACES = [("Heart", "Lung", "Eye"), ("Dental", "Skin")]
EXAMPLES = [
    [Example("A murmur in systole", "Heart"), Example("Blurred vision", "Eye")],
    [Example("Caries of the lower molar", "Dental"), Example("It itches", "Skin")],
]


@pytest.fixture(scope="module")
def shares(minilm):
    pairs = zip(SPACES, EXAMPLES, strict=True)
    return [TaskDataset(labels, minilm.encode(examples, labels)) for labels, examples in pairs]


@pytest.mark.parametrize("name", TRAINED)
def test_tasks_learnt_at_once_are_a_first_task_in_every_method(minilm, shapes, shares, name):
    """Cross-entropy of every example in its own label space, whatever the batch."""
    method = make_method(MethodConfig(name=name), AdapterConfig())
    empty = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16))
    state = method.begin_task(empty, seeded(0))
    load_state(minilm, state)
    data = [example for share in shares for example in share.data]
    task = LocalTask(minilm, state, data, shares[0].labels, (), joint_tasks=shares)
    objective = method.objective(task)
    order = [3, 0, 2, 1]
    with torch.no_grad():
        found = objective.example_losses(order)
        for loss, i in zip(found, order, strict=True):
            scores = minilm.scores([data[i]], shares[i // 2].labels)
            expected = cross_entropy(scores, torch.tensor([data[i].target]))
            torch.testing.assert_close(loss, expected[()], rtol=1e-4, atol=1e-4)
        assert objective.example_losses([2]).item() == pytest.approx(found[2].item(), rel=1e-4)
